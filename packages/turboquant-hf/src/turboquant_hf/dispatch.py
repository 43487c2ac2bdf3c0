"""Which models attend with the function that their configuration names."""

import torch

from turboquant_hf._compat import PreTrainedConfig, decoder_class

ATTENTION = "turboquant"
_own_attention: dict[type[PreTrainedConfig], str | None] = {}


def check_dispatch(config: PreTrainedConfig | None) -> None:
    """Raise ValueError if the model of a configuration attends by code of its own, whatever that names."""
    # Not while a graph is traced: a model of that kind has run before, or cannot be compiled.
    if config is None or torch.compiler.is_compiling():
        return
    kind = type(config)
    if kind not in _own_attention:
        model = decoder_class(config)
        is_own = model is not None and not model._can_set_attn_implementation()
        _own_attention[kind] = model.__name__ if is_own else None
    if (name := _own_attention[kind]) is not None:
        raise ValueError(
            f"{name} does not attend through transformers' AttentionInterface, and so not with "
            f'attn_implementation="{ATTENTION}". {other_attention(config)}'
        )


def other_attention(config: PreTrainedConfig | None) -> str:
    """What to do about a model that cannot attend on codes."""
    model = None if config is None else decoder_class(config)
    works = '"eager"' if model is not None and not model._supports_sdpa else '"sdpa" or "eager"'
    return f"Use attn_implementation={works} for it; the cache then gives it dequantised keys and values."
