"""How a command begins a long measurement, or goes on with one."""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from turboquant_core.command_output import CommandError, printable
from turboquant_hf.tools.run_files.run_file import RunFile, is_begun, read_run_file

SECTION_NAMES = {"settings": "settings", "environment": "versions or on another machine", "model": "weights"}


def has_begun(path: Path, command: str, *, force: bool) -> bool:
    """Whether there is a run file to go on with; with force, any other file is none.

    Raises:
        CommandError: If there is something that is no file.
    """
    try:
        return is_begun(path, command, force=force)
    except (OSError, ValueError) as error:
        raise CommandError(f"{error}. Name another one.") from error


def begin(
    path: Path,
    command: str,
    header: Mapping[str, Any],
    option: str,
    check: Callable[[RunFile], object],
    *,
    force: bool,
) -> RunFile:
    """A new run file, which replaces what is there at its first result; or one that another run began meanwhile.

    Args:
        path: The file.
        command: The command that writes it.
        header: As for `RunFile`.
        option: As for `go_on`.
        check: As there.
        force: Replace a file that the command did not write.

    Raises:
        CommandError: As for `go_on`, if there is a file by now that is not to be replaced.
    """
    if has_begun(path, command, force=force):
        return go_on(path, command, {section: header[section] for section in SECTION_NAMES}, option, check)
    return RunFile(path, command, header, force=force)


def go_on(
    path: Path,
    command: str,
    sections: Mapping[str, Mapping[str, Any]],
    option: str,
    check: Callable[[RunFile], object],
) -> RunFile:
    """The run file that is to go on.

    Args:
        path: The file.
        command: The command that writes it.
        sections: What has to be as it was when the run was begun.
        option: The option that names the file.
        check: Raises ValueError where a result is damaged.

    Raises:
        CommandError: If there is none, it is something else or damaged, or was begun otherwise.
    """
    try:
        run = read_run_file(path, command)
        check(run)
    except FileNotFoundError:
        raise CommandError(f"there is no run file {path} to go on from; leave --resume out to begin one") from None
    except (OSError, ValueError) as error:
        raise CommandError(f"{error}. Pass {option} with another name, or remove the file.") from error
    refuse_differences(run, sections, option)
    return run


def refuse_differences(run: RunFile, sections: Mapping[str, Mapping[str, Any]], option: str) -> None:
    """Raise CommandError if a run was begun otherwise."""
    for section, expected in sections.items():
        if differences := list(run.differences(section, expected)):
            raise CommandError(
                f"{run.path} was begun with other {SECTION_NAMES[section]}: {'; '.join(differences)}. Go on with the "
                f"same, or pass {option} with another name."
            )


def typed_command() -> str:
    """The command line that was typed."""
    return printable(shlex.join(["turboquant", *sys.argv[1:]]))


@contextmanager
def keeping(run: RunFile, path: Path, what: str) -> Iterator[None]:
    """Say what is kept when measuring is interrupted or fails; `what` is such as "tune MODEL"."""
    try:
        yield
    except KeyboardInterrupt:
        raise CommandError.interrupted(f"the same command goes on from {path}") from None
    except (ValueError, RuntimeError) as error:
        kept = f" What was measured is in {path}; the same command goes on from there." if run.results else ""
        raise CommandError(f"cannot {what}: {error}{kept}") from error
