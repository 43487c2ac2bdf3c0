"""`attn_implementation="turboquant"`: attention that decodes on a layer's codes, which `handover` brings."""

from typing import Any

import torch

from turboquant_hf._compat import AttentionInterface, AttentionMaskInterface
from turboquant_hf.attention.dense import dense_attention, is_causal
from turboquant_hf.attention.dispatch import ATTENTION
from turboquant_hf.attention.gradients import without_gradient
from turboquant_hf.attention.handover import Prompt, Stored, taken_over
from turboquant_hf.attention.masks import (
    Rows,
    check_length,
    check_mask,
    is_of_prompt,
    mask_of_stored,
    over_parts,
    prompt_starts,
    rows_of,
    turboquant_mask,
)
from turboquant_hf.storage.tables import MAX_STEP_TOKENS

# Arguments of attention functions that others than SDPA take.
_REFUSED = {
    "output_attentions": "forms no weights that could be given",
    "head_mask": "has no mask of heads",
    "indices": "takes a mask, and no tokens that an indexer chose",
    "sinks": "knows sinks of heads (s_aux), and none of each token",
}


def register() -> None:
    """Tell transformers of the attention and of its mask; once or often."""
    AttentionInterface.register(ATTENTION, turboquant_attention)
    # Without a mask function of that name, transformers gives attention no mask and says nothing.
    AttentionMaskInterface.register(ATTENTION, turboquant_mask)


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
    """Attend on the codes that keys and values stand for; if none, or where no kernel serves the call, on dense keys.

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
        [batch_size, query_len, num_heads, head_dim], contiguous, for some models take a view of it, and None for
        weights, which are never formed.

    Raises:
        TypeError: If the mask is no bool or additive tensor.
        ValueError: If weights are asked for, something that SDPA does not take, or a mask of another length.
        RuntimeError: If the model has changed the keys or values that the cache gave it.
    """
    if attention_mask is not None:
        check_mask(attention_mask)
    for asked, why in _REFUSED.items():
        if kwargs.get(asked) is not None and kwargs[asked] is not False:
            raise ValueError(f'attn_implementation="{ATTENTION}" {why}. Use attn_implementation="eager" for {asked}.')
    given = taken_over(module, key, value)
    if isinstance(given, Stored):
        store, query_len = given.store, query.shape[2]
        causal, position_bias = query_len == 1 or is_causal(module, **kwargs), kwargs.get("position_bias")
        rows = None if dropout or position_bias is not None else _rows_of_call(attention_mask, causal)
        if rows is not None and store.pages.has_kernel and query_len <= MAX_STEP_TOKENS:
            output = store.attend(query.detach(), rows.starts, rows.window, scale=scaling, softcap=softcap, sinks=s_aux)
            if given.wants_gradient or (query.requires_grad and torch.is_grad_enabled()):
                output = without_gradient(output)
            return output if rows.doubt is None else output + rows.doubt.to(output.dtype), None
        parts, num_tokens = None, key.shape[2]
        if position_bias is not None:
            check_length(position_bias, num_tokens)
        if store.parts_calls:
            key, value, parts = store.dequantize_parts(key.dtype, given.recent)
            # Layers that share a cache may compute the last of the new tokens alone.
            parts = parts[:, -query_len:]
            if position_bias is not None:
                kwargs["position_bias"] = over_parts(position_bias, num_tokens, parts)
        else:
            key, value = store.dequantize(key.dtype)
        if given.wants_gradient:
            key, value = without_gradient(key), without_gradient(value)
        attention_mask = mask_of_stored(attention_mask, query, num_tokens, causal, parts)
    else:
        shows_the_first = attention_mask is not None and _shows_the_first(module, attention_mask, query, **kwargs)
        if isinstance(given, Prompt):
            key, value = given.keys, given.values
            attention_mask = None if attention_mask is None else _mask_of_prompt(given, attention_mask)
        elif attention_mask is not None:
            check_length(attention_mask, key.shape[2])
        if shows_the_first:
            # Over these keys alone no mask says the same, and SDPA has faster kernels.
            key, value, attention_mask = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]], None
    options: dict[str, Any] = {"softcap": softcap, "sinks": s_aux, **kwargs}
    return dense_attention(module, query, key, value, attention_mask, dropout, scaling, **options)


def _shows_the_first(module: torch.nn.Module, attention_mask: torch.Tensor, query: torch.Tensor, **kwargs: Any) -> bool:
    """Whether the mask is causal over as many first keys as there are queries, and hides the rest."""
    whole = is_of_prompt(attention_mask) and attention_mask.shape[2] == query.shape[2]
    return whole and is_causal(module, **kwargs) and kwargs.get("position_bias") is None


def _mask_of_prompt(prompt: Prompt, attention_mask: torch.Tensor) -> torch.Tensor:
    """The mask over a prompt's own tokens; one whose rows begin with padding is stored again, with where they start."""
    num_tokens = prompt.keys.shape[2]
    check_length(attention_mask, num_tokens, prompt.room)
    row_starts = prompt_starts(attention_mask, num_tokens)
    if row_starts is not None:
        prompt.store_again(prompt.keys, prompt.values, row_starts)
    return attention_mask[..., :num_tokens]


def _rows_of_call(attention_mask: torch.Tensor | None, causal: bool) -> Rows | None:
    """What the mask of a call amounts to, None if it is something else; without a mask, what is meant by none."""
    if attention_mask is not None:
        return rows_of(attention_mask)
    return Rows(None, None) if causal else None
