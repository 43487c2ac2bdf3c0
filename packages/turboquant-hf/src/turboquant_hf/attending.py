"""Have a model attend another way for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from turboquant_hf._compat import Cache
from turboquant_hf.attention.dispatch import ATTENTION
from turboquant_hf.layers.growing import TurboQuantLayer


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


@contextmanager
def reading_as_in_decoding(model: PreTrainedModel, cache: Cache) -> Iterator[None]:
    """Let every token of a call see of a cache what it would see if it were alone.

    Where `TurboQuantCache` keeps recent tokens as they are, only its own attention tells the tokens of a call apart.
    """
    keeps_recent = any(isinstance(layer, TurboQuantLayer) and layer.recent_tokens for layer in cache.layers)
    with attending(model, ATTENTION if keeps_recent else model.config._attn_implementation):
        yield
