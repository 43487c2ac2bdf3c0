"""Have a model attend another way for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel


@contextmanager
def attending(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Set `attn_implementation`, and put back what was there."""
    before = model.config._attn_implementation
    if implementation == before:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
