"""How a command begins a long measurement, or goes on with one."""

import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from turboquant_hf.command_line import fail
from turboquant_hf.eval.run_file import RunFile, read_run_file
from turboquant_hf.eval.settings import environment

SECTION_NAMES = {"settings": "settings", "environment": "versions or on another machine", "model": "weights"}


def environment_or_fail(device: str, errors: Console) -> dict[str, Any]:
    """The machine and the versions, or the end of the command where there is no such device."""
    try:
        return environment(device)
    except (RuntimeError, AssertionError) as error:
        fail(errors, f"there is no device {device}: {error}")


def continued_or_fail(
    path: Path,
    command: str,
    sections: Mapping[str, Mapping[str, Any]],
    option: str,
    check: Callable[[RunFile], object],
    errors: Console,
) -> RunFile:
    """The run file that is to go on, or the end of the command with what is wrong with it.

    Args:
        path: The file.
        command: The command that writes it.
        sections: What has to be as it was when the run was begun.
        option: The option that names the file.
        check: Raises ValueError where a result is damaged.
        errors: Where errors are printed.
    """
    try:
        run = read_run_file(path, command)
        check(run)
    except FileNotFoundError:
        fail(errors, f"there is no run file {path} to go on from; leave --resume out to begin one")
    except (OSError, ValueError) as error:
        fail(errors, f"{error}. Pass {option} with another name, or remove the file.")
    refuse_differences(run, sections, option, errors)
    return run


def refuse_differences(run: RunFile, sections: Mapping[str, Mapping[str, Any]], option: str, errors: Console) -> None:
    """End the command if a run was begun otherwise."""
    for section, expected in sections.items():
        if differences := list(run.differences(section, expected)):
            fail(
                errors,
                f"{run.path} was begun with other {SECTION_NAMES[section]}: {'; '.join(differences)}. Go on with the "
                f"same, or pass {option} with another name.",
            )


def typed_command() -> str:
    """The command line that was typed."""
    return shlex.join(["turboquant", *sys.argv[1:]])


@contextmanager
def keeping_or_fail(run: RunFile, path: Path, what: str, errors: Console) -> Iterator[None]:
    """End the command when measuring is interrupted or fails, and say what is kept; `what` is such as "tune MODEL"."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print(f"interrupted; the same command goes on from {path}")
        raise typer.Exit(130) from None
    except (ValueError, RuntimeError) as error:
        kept = f" What was measured is in {path}; the same command goes on from there." if run.results else ""
        fail(errors, f"cannot {what}: {error}{kept}")
