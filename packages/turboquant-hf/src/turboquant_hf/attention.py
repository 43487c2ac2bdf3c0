"""`attn_implementation="turboquant"`: attention that decodes on a layer's codes.

A model's attention calls `update` of the cache and then the attention function, which is given the keys that `update`
returned and not the cache. So a layer that is to be read as codes returns keys and values of the right shape whose
every element is NaN, and hangs its states on the keys. A model that looks at the keys itself, or another attention
function, turns everything into NaN: loudly wrong, never subtly.

`update` does not see the mask either. So the first tokens are stored as if none were padding, and stored again when
attention finds that rows begin with some.
"""

from collections.abc import Callable
from typing import Any

import torch

from turboquant_core.ops.decode_attention import MAX_QUERY_LEN
from turboquant_hf._compat import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from turboquant_hf.dense import dense_attention, is_causal
from turboquant_hf.masks import Rows, check_mask, mask_of_stored, over_parts, prompt_starts, rows_of, turboquant_mask
from turboquant_hf.states import PagedStates
from turboquant_hf.tables import not_a_number

ATTENTION = "turboquant"
_STATES = "turboquant_states"
_RECENT = "turboquant_recent"
_STORE_AGAIN = "turboquant_store_again"


def register() -> None:
    """Tell transformers of the attention and of its mask; once or often."""
    AttentionInterface.register(ATTENTION, turboquant_attention)
    # Without a mask function of that name, transformers gives attention no mask and says nothing.
    AttentionMaskInterface.register(ATTENTION, turboquant_mask)


def reads_codes(text_config: PreTrainedConfig | None) -> bool:
    """Whether a model of this configuration attends with `turboquant_attention` at this moment."""
    return text_config is not None and text_config._attn_implementation == ATTENTION


def hand_over(
    states: PagedStates, dtype: torch.dtype, recent: tuple[torch.Tensor, torch.Tensor] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Placeholders [batch_size, num_kv_heads, num_tokens, head_dim] for keys that carry the states, and for values.

    Args:
        states: What is stored.
        dtype: Type of the placeholders.
        recent: What `PagedStates.append_parts` gave; goes with the keys, too.
    """
    nan = not_a_number(dtype, states.pages.device)
    shape = (states.batch_size, states.num_kv_heads, states.read_length, states.config.head_dim)
    keys, values = nan.expand(shape), nan.expand(shape)
    setattr(keys, _STATES, states)
    if recent is not None:
        setattr(keys, _RECENT, recent)
    return keys, values


def hand_over_prompt(
    keys: torch.Tensor, store_again: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
) -> None:
    """Have attention tell a layer where the rows of a padded prompt start.

    Args:
        keys: What `update` returns.
        store_again: Called with keys, values and starts int32 [batch_size] if a row begins with padding.
    """
    setattr(keys, _STORE_AGAIN, store_again)


def turboquant_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend on the codes that the keys carry; without any, or where no kernel serves the call, on dense keys.

    Args:
        module: The model's attention.
        query: [batch_size, num_heads, query_len, head_dim].
        key: [batch_size, num_kv_heads, num_tokens, head_dim].
        value: The same for values.
        attention_mask: What `turboquant_mask` made, or a mask of the caller's own; None for a causal one.
        dropout: Probability of dropping a weight.
        scaling: What logits are multiplied with; None is 1 / sqrt(head_dim).
        softcap: Logits become softcap * tanh(logits / softcap).
        s_aux: [num_heads], a sink of each head: a logit that takes weight and gives no value.
        **kwargs: What `sdpa_attention_forward` takes.

    Returns:
        [batch_size, query_len, num_heads, head_dim], and None for weights, which are never formed.
    """
    check_mask(attention_mask)
    states: PagedStates | None = getattr(key, _STATES, None)
    options = {"softcap": softcap, "sinks": s_aux, **kwargs}
    if states is not None:
        query_len, num_tokens = query.shape[2], key.shape[2]
        causal, position_bias = query_len == 1 or is_causal(module, **kwargs), kwargs.get("position_bias")
        rows = None if dropout or position_bias is not None else _rows_of_call(attention_mask, causal)
        if rows is not None and states.has_kernel and query_len <= MAX_QUERY_LEN:
            output = states.attend(
                query, scale=scaling, seq_starts=rows.starts, window=rows.window, softcap=softcap, sinks=s_aux
            )
            return output if rows.doubt is None else output + rows.doubt.to(output.dtype), None
        parts = None
        if states.parts_calls:
            key, value, parts = states.dequantize_parts(key.dtype, getattr(key, _RECENT, None))
            # Layers that share a cache may compute the last of the new tokens alone.
            parts = parts[:, -query_len:]
            if position_bias is not None:
                options["position_bias"] = over_parts(position_bias, num_tokens, parts)
        else:
            key, value = states.dequantize(key.dtype)
        attention_mask = mask_of_stored(attention_mask, query, num_tokens, causal, parts)
    elif attention_mask is not None and query.shape[2] == key.shape[2]:
        _leave_out_padding(key, value, attention_mask)
        # A static cache has masks for all that it can hold, and hands a prompt over as it is.
        attention_mask = attention_mask[..., : key.shape[2]]
    return dense_attention(module, query, key, value, attention_mask, dropout, scaling, **options)


def _leave_out_padding(key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Have a prompt whose rows begin with padding stored again, with where they start."""
    store_again = getattr(key, _STORE_AGAIN, None)
    if store_again is not None:
        row_starts = prompt_starts(attention_mask, key.shape[2])
        if row_starts is not None:
            store_again(key, value, row_starts)


def _rows_of_call(attention_mask: torch.Tensor | None, causal: bool) -> Rows | None:
    """What the mask of a call amounts to, None if it is something else; without a mask, what is meant by none."""
    if attention_mask is not None:
        return rows_of(attention_mask)
    return Rows(None, None) if causal else None
