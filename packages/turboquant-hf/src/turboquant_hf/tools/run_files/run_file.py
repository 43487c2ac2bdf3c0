"""The file of a long measurement: what was asked, on what, and every result so far."""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from turboquant_core.command_output import has_marker
from turboquant_core.files import read_json, write_atomically

VERSION = 1
SECTIONS = ("settings", "environment", "model", "results")


class RunFile:
    """A run file, written anew after each result: whatever happens, the file is whole.

    Args:
        path: The file.
        command: The command that writes it, such as "turboquant eval".
        header: Sections but for the results, and whatever else is to be kept.
        results: Unit to result.
        force: Let the first result replace a file that the command did not write.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        header: Mapping[str, Any],
        results: Mapping[str, Any] | None = None,
        *,
        force: bool = False,
    ) -> None:
        self.path = path
        self.command = command
        self.header = dict(header)
        self.results = dict(results or {})
        self.force = force

    def add(self, unit: str, result: Mapping[str, Any]) -> None:
        """Keep a result, in the file too, beside those that another run has written there meanwhile.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If it is damaged now, of a run with other settings, or something else; it stays as it is.
        """
        with _alone(self.path):
            if is_begun(self.path, self.command, force=self.force):
                found = read_run_file(self.path, self.command)
                for section in SECTIONS[:-1]:
                    if differences := list(found.differences(section, _as_json(self.header[section]))):
                        raise ValueError(
                            f"{self.path} was written by another run meanwhile, with other {section}: "
                            f"{'; '.join(differences)}. It is left as it is; name another file"
                        )
                self.results |= found.results
            self.results[unit] = dict(result)
            data = {"format": self.command, "version": VERSION, **self.header, "results": self.results}
            write_atomically(self.path, json.dumps(data, indent=1, allow_nan=False) + "\n")
            self.force = False

    def differences(self, section: str, expected: Mapping[str, Any]) -> Iterator[str]:
        """What a section of the file says otherwise, one sentence each."""
        found = self.header[section]
        for key in dict.fromkeys([*expected, *found]):
            if found.get(key) != expected.get(key):
                yield f"{key.replace('_', ' ')} is {_say(found.get(key))} there and {_say(expected.get(key))} here"


def is_begun(path: Path, command: str, *, force: bool = False) -> bool:
    """Whether there is a run file of a command at a path, or something that is not to be replaced.

    Args:
        path: The path.
        command: The command.
        force: Whether a file that the command did not write may be replaced.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no file, such as a pipe, which nothing could be read from again.
    """
    if not path.exists():
        return False
    if not path.is_file():
        raise ValueError(f"{path} is no file, and a run file is read again after each result")
    return not force or has_marker(path, f'"format": "{command}"')


def read_run_file(path: Path, command: str) -> RunFile:
    """The run file of a command at a path.

    Raises:
        OSError: If there is none, or it cannot be read.
        ValueError: If it is damaged, or something else.
    """
    try:
        data = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no run file, or damaged or half-written: {error}") from None
    if not isinstance(data, dict) or data.get("format") != command:
        raise ValueError(f"{path} is no run file of `{command}`")
    if data.get("version") != VERSION:
        raise ValueError(
            f"{path} is a run file of version {data.get('version')!s:.40}; this turboquant-hf reads {VERSION}"
        )
    for section in SECTIONS:
        if not isinstance(data.get(section), dict):
            raise ValueError(f"{path} is a damaged run file: it has no section {section!r}")
    results = data.pop("results")
    header = {key: value for key, value in data.items() if key not in ("format", "version")}
    return RunFile(path, command, header, results)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep others from writing a run file in between; they wait as long.

    Raises:
        ValueError: If somebody's file has the name of the lock.
    """
    lock = lock_path(path)
    with suppress(FileNotFoundError):
        found = lock.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size:
            raise ValueError(f"{lock} is to be an empty file, with which runs wait for each other; move it away")
    with FileLock(lock):
        try:
            yield
        finally:
            # While it is held: who waits for it sees that it is gone, and makes another.
            with suppress(OSError):
                lock.unlink()


def lock_path(path: Path) -> Path:
    """The lock of a run file: one, whatever link it is written through, and with room for a name of any length."""
    target = Path(os.path.realpath(path))
    return target.with_name(f".turboquant-{sha256(os.fsencode(target.name)).hexdigest()[:16]}.lock")


def _as_json(section: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(section))


def _say(value: object) -> str:
    return "not given" if value is None else json.dumps(value)
