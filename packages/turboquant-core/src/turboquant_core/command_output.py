"""How a command ends: with an error in one line, and with JSON that is alone on the output."""

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from turboquant_core.files import write_atomically
from turboquant_core.interrupts import INTERRUPTED

REFUSED = 1
"""Status of a command that says no."""

FAILED = 2
"""Status of a command that cannot read or write what it was given."""

STDOUT = "-"
"""What `--json` is given for the output instead of a file."""

# Formats are named at the beginning of a file.
_HEAD_BYTES = 1 << 16

_EXTRA_OF = 'In the clone run `uv pip install ./packages/turboquant-core "./packages/{}[tools]"`.'

_json_stream: ContextVar[TextIO | None] = ContextVar("json_stream", default=None)


class CommandError(Exception):
    """What ends a command.

    Args:
        message: What is wrong, and the remedy.
        status: Exit status of the process.
        label: The word before the message, if any.
    """

    def __init__(self, message: str, status: int = FAILED, label: str = "error") -> None:
        super().__init__(" ".join(message.split()))
        self.status = status
        self.label = label

    @classmethod
    def interrupted(cls, remedy: str = "") -> "CommandError":
        """What Ctrl-C makes of a command, and how it goes on."""
        return cls(f"interrupted{remedy and '; '}{remedy}", INTERRUPTED, label="")


def how_to_install(package: str = "turboquant-hf") -> str:
    """The command that installs a package with the extra that its subcommands need."""
    return _EXTRA_OF.format(package)


def json_target(arguments: Sequence[str]) -> str | None:
    """What `--json` is given among arguments that may be wrong otherwise."""
    target = None
    for argument, following in zip_longest(arguments, arguments[1:]):
        if argument == "--":
            break
        if argument == "--json":
            target = following
        elif argument.startswith("--json="):
            target = argument.removeprefix("--json=")
    return target


@contextmanager
def json_alone() -> Iterator[None]:
    """Have what is printed meanwhile go to the errors, but for what `write_json` prints."""
    token = _json_stream.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _json_stream.reset(token)


def write_json(command: str, data: Mapping[str, Any], target: str) -> None:
    """Write what a command found to a file, or to the output.

    Args:
        command: The command's name, by which `check_outputs` knows the file again.
        data: What it found.
        target: The file, or "-" for the output.

    Raises:
        CommandError: If a number is not finite, which JSON cannot say.
        OSError: If it cannot be written.
    """
    if bad := next(not_finite(data), None):
        raise CommandError(f"{bad}, which is no result", REFUSED)
    text = json.dumps({"format": _json_format(command), **data}, indent=2, allow_nan=False) + "\n"
    if target == STDOUT:
        stream = _json_stream.get() or sys.stdout
        stream.write(text)
        stream.flush()
    else:
        write_atomically(target, text)


def printable(name: str) -> str:
    """A name with escapes for what is no text in it, as names of files may have it."""
    return name.encode(errors="backslashreplace").decode()


def not_finite(value: object, name: str = "result") -> Iterator[str]:
    """Every number in plain data that is not finite, such as "mean_kl is nan"."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from not_finite(item, str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from not_finite(item, name)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name} is {value}"


class Output(NamedTuple):
    """A file that a command writes.

    Attributes:
        option: The option that names it.
        path: The file; None if none is written.
        marker: What its beginning holds if the same command wrote it; None if whoever writes it looks for that.
    """

    option: str
    path: str | os.PathLike[str] | None
    marker: str | None


def json_output(command: str, target: str | None) -> Output:
    """What `write_json` writes for a command."""
    return Output("--json", None if target == STDOUT else target, f'"format": "{_json_format(command)}"')


def check_outputs(
    outputs: Sequence[Output], inputs: Mapping[str, str | os.PathLike[str] | None], *, force: bool = False
) -> None:
    """Refuse files that cannot be written, or that would be lost, before the work for them is done.

    Args:
        outputs: What the command writes.
        inputs: Option or argument to the file that is read; None where there is none.
        force: Whether files that others wrote may be replaced.

    Raises:
        CommandError: If a file cannot be written, was not written by the command and is not empty, or is an input or
            an output twice.
    """
    names = {os.path.realpath(path): option for option, path in inputs.items() if path is not None}
    for option, path, marker in outputs:
        if path is None:
            continue
        _check_output(Path(path), marker, force)
        other = names.setdefault(os.path.realpath(path), option)
        if other != option:
            raise CommandError(f"{other} and {option} are the same file, {path}. Name another one.")


def has_marker(path: Path, marker: str) -> bool:
    """Whether a file's beginning holds some text."""
    with path.open("rb") as file:
        return marker.encode() in file.read(_HEAD_BYTES)


def _check_output(path: Path, marker: str | None, force: bool) -> None:
    try:
        # A link's target is written.
        folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
        if not folder.is_dir():
            raise CommandError(f"there is no folder {folder} to write {path.name} to")
        if path.is_dir():
            raise CommandError(f"{path} is a folder; name a file to write")
        try:
            is_there = bool(path.stat())
        except FileNotFoundError:
            is_there = False
        if not os.access(path if is_there else folder, os.W_OK):
            raise CommandError(f"{path} cannot be written: {'it' if is_there else folder} is read-only")
        if marker is None or force or not path.is_file() or has_marker(path, marker):
            return
        if path.stat().st_size:
            raise CommandError(
                f"{path} is there, and this command did not write it. Name another file, or replace it with --force."
            )
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be written: {error}") from None


def _json_format(command: str) -> str:
    return " ".join(filter(None, ("turboquant", command, "--json")))
