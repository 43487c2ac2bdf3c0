"""Which models attend with the function that their configuration names."""

import torch

from turboquant_hf._compat import CODES_NOT_READ, PreTrainedConfig, decoder_class

ATTENTION = "turboquant"
_own_attention: dict[type[PreTrainedConfig], str | None] = {}


def check_dispatch(config: PreTrainedConfig | None) -> None:
    """Raise ValueError if the model of a configuration attends by code of its own, whatever that names."""
    # Not while a graph is traced: a model of that kind has run before, or cannot be compiled.
    if config is None or torch.compiler.is_compiling():
        return
    kind = type(config)
    if kind not in _own_attention:
        _own_attention[kind] = own_attention(config)
    if (why := _own_attention[kind]) is not None:
        raise ValueError(
            f'{why}, and so does not attend with attn_implementation="{ATTENTION}". {other_attention(config)}'
        )


def own_attention(config: PreTrainedConfig) -> str | None:
    """Why the model of a configuration cannot attend on codes, beginning with its name; None if it can."""
    model = decoder_class(config)
    if model is None:
        return None
    if not model._can_set_attn_implementation():
        return f"{model.__name__} does not attend through transformers' AttentionInterface"
    reason = CODES_NOT_READ.get(config.get_text_config(decoder=True).model_type)
    return None if reason is None else f"{model.__name__} {reason}"


def other_attention(config: PreTrainedConfig | None) -> str:
    """What to do about a model that cannot attend on codes."""
    model = None if config is None else decoder_class(config)
    works = '"eager"' if model is not None and not model._supports_sdpa else '"sdpa" or "eager"'
    return f"Use attn_implementation={works} for it; the cache then gives it dequantised keys and values."
