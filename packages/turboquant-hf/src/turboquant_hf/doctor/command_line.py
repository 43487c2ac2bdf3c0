"""What doctor and plan share: opening a model's files, and the card."""

from typing import NoReturn

import typer
from rich.console import Console
from rich.text import Text

from turboquant_hf.command_line import fail
from turboquant_hf.doctor.attention import ModelAttention, model_attention
from turboquant_hf.doctor.cards import Card, find_card
from turboquant_hf.doctor.checkpoint import Checkpoint, open_checkpoint
from turboquant_hf.models import default_model

REFUSED = 1


def refuse(errors: Console, message: str) -> NoReturn:
    """Say that a model is not served, and end the command with status 1."""
    errors.print(Text.assemble(("refused: ", "bold red"), message))
    raise typer.Exit(REFUSED)


def open_or_fail(name: str | None, errors: Console) -> tuple[Checkpoint, ModelAttention]:
    """A model's files and how it attends; ends the command with what is wrong with them."""
    name = name or default_model()
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
