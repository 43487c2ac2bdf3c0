"""The file of a long measurement: what was asked, on what, and every result so far."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

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
    """

    def __init__(
        self, path: Path, command: str, header: Mapping[str, Any], results: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self.command = command
        self.header = dict(header)
        self.results = dict(results or {})

    def add(self, unit: str, result: Mapping[str, Any]) -> None:
        """Keep a result, in the file too, beside those that another run has written there meanwhile.

        Raises:
            OSError: If the file cannot be written.
            ValueError: If it is damaged now, or of a run with other settings; it stays as it is.
        """
        with _alone(self.path):
            found = read_run_file(self.path, self.command) if self.path.exists() else None
            if found is not None:
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

    def differences(self, section: str, expected: Mapping[str, Any]) -> Iterator[str]:
        """What a section of the file says otherwise, one sentence each."""
        found = self.header[section]
        for key in dict.fromkeys([*expected, *found]):
            if found.get(key) != expected.get(key):
                yield f"{key.replace('_', ' ')} is {_say(found.get(key))} there and {_say(expected.get(key))} here"


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
    """Keep others from writing a run file in between; they wait as long."""
    lock = Path(f"{path}.lock")
    with FileLock(lock):
        try:
            yield
        finally:
            # While it is held: who waits for it sees that it is gone, and makes another.
            with suppress(OSError):
                lock.unlink()


def _as_json(section: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(section))


def _say(value: object) -> str:
    return "not given" if value is None else json.dumps(value)
