"""`attn_implementation="turboquant"`: attention that decodes on a layer's codes.

A model's attention calls `update` of the cache and then the attention function, which is given the keys that `update`
returned and not the cache. So a layer that is to be read as codes returns keys and values of the right shape whose
every element is NaN, and hangs its states on the keys. A model that looks at the keys itself, or another attention
function, turns everything into NaN: loudly wrong, never subtly.

`update` does not see the mask either. So the first tokens are stored as if none were padding, and stored again when
attention finds that rows begin with some.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from turboquant_core.ops.decode_attention import MAX_QUERY_LEN
from turboquant_hf import ops
from turboquant_hf._compat import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, sdpa_mask
from turboquant_hf.dense import dense_attention
from turboquant_hf.states import PagedStates
from turboquant_hf.tables import not_a_number, padded_starts

ATTENTION = "turboquant"
_STATES = "turboquant_states"
_RECENT = "turboquant_recent"
_ROWS = "turboquant_rows"
_PADDING_MASK = "turboquant_padding_mask"
_STORE_AGAIN = "turboquant_store_again"


class Rows(NamedTuple):
    """What a mask amounts to: causal, within a window, from a first token of every row on.

    Attributes:
        starts: int32 [batch_size], the first token of every row that may be seen, counted from the row's very first;
            None for all of them.
        window: Tokens that a token sees, itself included; None for all.
        doubt: float [], what is added to the output: 0, and NaN where the mask was something else. None where that has
            been looked at.
    """

    starts: torch.Tensor | None
    window: int | None
    doubt: torch.Tensor | None = None


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
    states: PagedStates | None = getattr(key, _STATES, None)
    if states is not None:
        rows = _rows_of_call(attention_mask, dropout, **kwargs)
        if rows is not None and states.has_kernel and query.shape[2] <= MAX_QUERY_LEN:
            output = states.attend(
                query, scale=scaling, seq_starts=rows.starts, window=rows.window, softcap=softcap, sinks=s_aux
            )
            return output if rows.doubt is None else output + rows.doubt.to(output.dtype), None
        if states.parts_calls and kwargs.get("is_causal") is not False and kwargs.get("position_bias") is None:
            key, value, seen = states.dequantize_parts(key.dtype, getattr(key, _RECENT, None))
            attention_mask = _with_parts(attention_mask, seen)
        else:
            key, value = states.dequantize(key.dtype)
    elif attention_mask is not None and query.shape[2] == key.shape[2]:
        _leave_out_padding(key, value, attention_mask)
        # A static cache has masks for all that it can hold, and hands a prompt over as it is.
        attention_mask = attention_mask[..., : key.shape[2]]
    return dense_attention(
        module, query, key, value, attention_mask, dropout, scaling, softcap=softcap, sinks=s_aux, **kwargs
    )


def turboquant_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int = 0, kv_offset: int = 0, **kwargs: Any
) -> torch.Tensor | None:
    """The mask that SDPA takes, bool [batch_size, 1, q_length, kv_length] or None for a causal one.

    Where a few tokens attend on stored ones, it is compared with causal attention from a first token of every row on,
    and what it amounts to is attached for `turboquant_attention`.
    """
    mask = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, **kwargs
    )
    if mask is None:
        return None
    if q_length <= MAX_QUERY_LEN and q_length < kv_length:
        setattr(mask, _ROWS, _rows_of_mask(mask, q_offset, kv_offset, kwargs.get("local_size")))
    padding_mask = kwargs.get("attention_mask")
    if padding_mask is not None and padding_mask.ndim == 2:
        setattr(mask, _PADDING_MASK, padding_mask)
    return mask


def _leave_out_padding(key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor) -> None:
    """Have a prompt whose rows begin with padding stored again, with where they start."""
    store_again, padding_mask = getattr(key, _STORE_AGAIN, None), getattr(attention_mask, _PADDING_MASK, None)
    if store_again is not None and padding_mask is not None:
        row_starts = padded_starts(key.shape[2], padding_mask)
        if row_starts is not None:
            store_again(key, value, row_starts)


def _with_parts(attention_mask: torch.Tensor | None, seen: torch.Tensor) -> torch.Tensor:
    """A mask of all tokens, None for a causal one, as one of `PagedStates.dequantize_parts`."""
    if attention_mask is None:
        return seen[:, None]
    num_tokens = attention_mask.shape[-1]
    mask = torch.cat([attention_mask, attention_mask[..., 2 * num_tokens - seen.shape[-1] :]], dim=-1)
    if mask.dtype == torch.bool:
        return mask & seen[:, None]
    return mask.masked_fill(~seen[:, None], torch.finfo(mask.dtype).min)


def _rows_of_call(
    attention_mask: torch.Tensor | None,
    dropout: float,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> Rows | None:
    """What the mask of a call amounts to; None for a call that is not attention within such a mask."""
    if dropout or is_causal is False or position_bias is not None:
        return None
    # A window that is as long as what is stored needs no mask.
    return Rows(None, sliding_window) if attention_mask is None else getattr(attention_mask, _ROWS, None)


def _rows_of_mask(mask: torch.Tensor, q_offset: int, kv_offset: int, window: int | None) -> Rows | None:
    """What a mask amounts to; None if it is something else."""
    query = torch.arange(mask.shape[2], device=mask.device)[:, None] + q_offset
    token = torch.arange(mask.shape[3], device=mask.device) + kv_offset
    seen = token <= query
    if window is not None:
        seen = seen & (token > query - window)
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and torch.equal(mask, seen.expand_as(mask)):
        return Rows(None, window)
    # The first query token sees the first token that any sees.
    starts = ops.first_seen(mask[:, 0, 0]) + kv_offset
    seen = seen & (token >= starts[:, None, None, None])
    if is_compiling:
        # Looking at a tensor would break the graph.
        is_same = (mask == seen).all()
        return Rows(starts.int(), window, torch.where(is_same, 0.0, torch.nan))
    return Rows(starts.int(), window) if torch.equal(mask, seen) else None
