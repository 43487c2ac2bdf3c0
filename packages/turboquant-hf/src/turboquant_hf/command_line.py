"""What the commands share: arguments, errors, files, progress, and loading a model."""

from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from transformers.utils import logging as transformers_logging

from turboquant_hf.demo.run import long_text
from turboquant_hf.models import EMBEDDED_PACKAGE, LoadedModel, default_model, load_model

ModelArgument = Annotated[
    str | None, typer.Argument(help="Hub id, folder or GGUF file. Default: SmolLM2-135M-Instruct.")
]
TextOption = Annotated[
    Path | None, typer.Option(help="Text file, UTF-8. Default: an encyclopaedia article of 3,000 tokens.")
]
DeviceOption = Annotated[str | None, typer.Option(help="torch device. Default: cuda where there is one, else cpu.")]


def fail(errors: Console, message: str) -> NoReturn:
    """Print an error and end the command with status 2."""
    errors.print(Text.assemble(("error: ", "bold red"), message))
    raise typer.Exit(2)


def check_target(path: Path, errors: Console) -> None:
    """End the command if no file can be written there, before the work for it is done."""
    if not path.parent.is_dir():
        fail(errors, f"there is no folder {path.parent} to write {path.name} to")
    if path.is_dir():
        fail(errors, f"{path} is a folder; name a file to write")


def text_or_fail(path: Path | None, errors: Console) -> str:
    """The text of a file, or without one the article; ends the command if it cannot be read."""
    if path is None:
        return long_text()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(errors, f"cannot read {path}: {error}. Pass --text with a UTF-8 text file.")


def chosen_device(device: str | None) -> str:
    """The device that was asked for, or the best there is."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def load_or_fail(name: str | None, device: str, errors: Console) -> LoadedModel:
    """Load a model, or end the command with what is wrong with it."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    name = name or default_model()
    try:
        with errors.status(f"loading {name}"):
            return load_model(name, device)
    except OSError as error:
        fail(
            errors,
            f"cannot load {name}: {error}\nPass MODEL: a hub id, a folder or a GGUF file that this machine can reach. "
            f"The default model also comes with the package {EMBEDDED_PACKAGE.replace('_', '-')}, installed without "
            "its dependencies.",
        )
    except (ValueError, RuntimeError) as error:
        fail(errors, f"cannot serve {name}: {error}")


def progress_bar(errors: Console) -> Progress:
    """A bar of what is done, gone when all is."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # As often as its clock moves: a notebook's `!` is a terminal too, and keeps every drawing.
    return Progress(*columns, console=errors, transient=True, refresh_per_second=1)
