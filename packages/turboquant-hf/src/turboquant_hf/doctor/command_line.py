"""What doctor and plan share: opening a model's files, the card, and JSON."""

import json
from pathlib import Path
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from turboquant_hf.command_line import check_target, fail
from turboquant_hf.doctor.attention import ModelAttention, model_attention
from turboquant_hf.doctor.cards import Card, find_card
from turboquant_hf.doctor.checkpoint import Checkpoint, open_checkpoint

REFUSED = 1
STDOUT = "-"


def refuse(errors: Console, message: str) -> NoReturn:
    """Say that a model is not served, and end the command with status 1."""
    errors.print(Text.assemble(("refused: ", "bold red"), message))
    raise typer.Exit(REFUSED)


def open_or_fail(name: str, errors: Console) -> tuple[Checkpoint, ModelAttention]:
    """A model's files and how it attends; ends the command with what is wrong with them."""
    try:
        with errors.status(f"reading the headers of {name}"):
            checkpoint = open_checkpoint(name)
    except (OSError, ValueError) as error:
        fail(
            errors, f"cannot read {name}: {error}\nPass a hub id, a folder or a GGUF file that this machine can reach."
        )
    try:
        return checkpoint, model_attention(checkpoint.config, checkpoint.tensors or ())
    except ValueError as error:
        refuse(errors, str(error))


def card_or_fail(gpu: str | None, errors: Console) -> Card | None:
    """The card of that name."""
    if gpu is None:
        return None
    try:
        return find_card(gpu)
    except ValueError as error:
        fail(errors, str(error))


def check_json_target(target: str | None, errors: Console) -> None:
    """End the command if the file cannot be written."""
    if target not in (None, STDOUT):
        check_target(Path(str(target)), errors)


def write_json(data: dict[str, Any], target: str) -> None:
    """Write to a file, or to the standard output."""
    text = json.dumps(data, indent=2) + "\n"
    if target == STDOUT:
        typer.echo(text, nl=False)
    else:
        Path(target).write_text(text, encoding="utf-8")
