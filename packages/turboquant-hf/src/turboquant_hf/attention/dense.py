"""Attention on dense keys and values: prefill, and whatever no kernel serves."""

from typing import Any

import torch

from turboquant_hf._compat import sdpa_attention_forward

# Logits formed at a time, where softcap or sinks rule SDPA out.
MAX_LOGITS = 1 << 26


def dense_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """SDPA, and with softcap or sinks, which it knows not, the plain computation over some queries at a time.

    Args:
        module: The model's attention.
        query: [batch_size, num_heads, query_len, head_dim].
        key: [batch_size, num_kv_heads, num_tokens, head_dim].
        value: The same for values.
        attention_mask: bool or additive, [batch_size, 1 or num_heads, query_len, num_tokens]; None for a causal one.
        dropout: Probability of dropping a weight.
        scaling: What logits are multiplied with; None is 1 / sqrt(head_dim).
        softcap: Logits become softcap * tanh(logits / softcap).
        sinks: [num_heads], a logit of each head that takes weight and gives no value.
        **kwargs: What `sdpa_attention_forward` takes.

    Returns:
        [batch_size, query_len, num_heads, head_dim], contiguous, and None for weights.
    """
    num_heads, query_len = query.shape[1:3]
    num_tokens = key.shape[2]
    makes_mask = softcap or sinks is not None or 1 < query_len < num_tokens
    # Queries are the last tokens, and SDPA would take them for the first: Gemma 4 asks for the last of a prompt alone.
    # Where they are the first, of a static cache of transformers, `turboquant_mask` makes a mask.
    if attention_mask is None and makes_mask and is_causal(module, **kwargs):
        attention_mask = causal_mask(query_len, num_tokens, query.device)
    if not softcap and sinks is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("position_bias") is not None:
        raise ValueError("softcap or sinks together with a position_bias are not supported. Use 'eager' attention.")
    key, value = (x.repeat_interleave(num_heads // key.shape[1], dim=1) for x in (key, value))
    step = max(1, MAX_LOGITS // (query.shape[0] * num_heads * num_tokens))
    outputs = []
    for first in range(0, query_len, step):
        part = query[:, :, first : first + step]
        mask = None if attention_mask is None else attention_mask[:, :, first : first + step]
        outputs.append(_attend(part, key, value, mask, dropout, scaling, softcap, sinks))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def causal_mask(query_len: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """What the last tokens see of all, bool [1, 1, query_len, num_tokens]."""
    ends = torch.arange(query_len, device=device) + (num_tokens - query_len)
    return torch.arange(num_tokens, device=device) <= ends[None, None, :, None]


def is_causal(module: torch.nn.Module, *, is_causal: bool | None = None, **_: Any) -> bool:
    """Whether no mask means a causal one, as SDPA takes it: the call says so, or else the model's attention."""
    return bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    weights = attention_weights(attention_logits(query, key, scaling, softcap), mask, sinks)
    return torch.dropout(weights, dropout, dropout > 0).to(value.dtype) @ value


def attention_logits(
    query: torch.Tensor, key: torch.Tensor, scaling: float | None, softcap: float | None
) -> torch.Tensor:
    """Logits float32 [batch_size, num_heads, query_len, num_tokens] of queries and as many heads of keys."""
    logits = (query @ key.transpose(2, 3)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def attention_weights(logits: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None) -> torch.Tensor:
    """What each query weighs each key with; a mask as in `dense_attention`, but for None, which shows all."""
    num_tokens = logits.shape[-1]
    if mask is not None:
        # Finite, so that a row which sees nothing, such as padding, is not NaN.
        unseen = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~mask, unseen) if mask.dtype == torch.bool else logits + mask
    if sinks is not None:
        logits = torch.cat([logits, sinks.float().view(-1, 1, 1).expand(*logits.shape[:3], 1)], dim=-1)
    return logits.softmax(-1)[..., :num_tokens]
