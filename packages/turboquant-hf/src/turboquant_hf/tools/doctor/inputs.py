"""What doctor and plan share: opening a model's files, and the card."""

from rich.console import Console
from rich.text import Text

from turboquant_core.command_output import REFUSED, CommandError
from turboquant_hf.tools.doctor.attention import ModelAttention, model_attention
from turboquant_hf.tools.doctor.cards import Card, find_card
from turboquant_hf.tools.doctor.checkpoint import Checkpoint, open_checkpoint
from turboquant_hf.tools.inputs import with_remedy
from turboquant_hf.tools.models import default_model

MAX_SIZE = 1 << 31
"""More than any size of a model."""

_SIZES = ("head_dim", "value_head_dim", "num_heads", "num_kv_heads", "window")


def open_model(name: str | None, errors: Console) -> tuple[Checkpoint, ModelAttention]:
    """A model's files and how it attends.

    Raises:
        CommandError: If they cannot be read, or the model is none that has a cache to compress.
    """
    name = default_model() if name is None else name
    try:
        with errors.status(Text(f"reading the headers of {name}")):
            checkpoint = open_checkpoint(name)
    except (OSError, ValueError) as error:
        remedy = "Pass a hub id, a folder or a GGUF file that this machine can reach."
        raise CommandError(f"cannot read {name}: {with_remedy(error, remedy)}") from error
    try:
        attention = model_attention(checkpoint.config, checkpoint.tensors or ())
    except ValueError as error:
        raise CommandError(str(error), REFUSED, "refused") from error
    # What sizes that are none lead to.
    except (ArithmeticError, TypeError, AttributeError, LookupError) as error:
        raise CommandError(
            f"cannot read {name}: its configuration describes no model ({type(error).__name__}: {error})"
        ) from error
    _check_sizes(name, attention)
    return checkpoint, attention


def _check_sizes(name: str, attention: ModelAttention) -> None:
    """Refuse sizes that no model has."""
    sizes: dict[str, object] = {"the longest context": attention.max_length}
    for layer, _ in attention.groups():
        if layer.is_compressed:
            sizes |= {f"{field} of layer {layer.index}": getattr(layer, field) for field in _SIZES}
    for what, size in sizes.items():
        if size is not None and not (isinstance(size, int) and 1 <= size <= MAX_SIZE):
            raise CommandError(f"cannot read {name}: {what} is {size}; sizes are from 1 to {MAX_SIZE:,}")


def named_card(gpu: str | None) -> Card | None:
    """The card of that name.

    Raises:
        CommandError: If there is none.
    """
    if gpu is None:
        return None
    try:
        return find_card(gpu)
    except ValueError as error:
        raise CommandError(str(error)) from error
