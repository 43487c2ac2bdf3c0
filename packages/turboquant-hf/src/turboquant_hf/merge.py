"""Attention on the tokens that are kept as they are, merged with what attention on the codes gave."""

import torch

from turboquant_hf.storage.full_precision import KeptCall


def attend_kept(
    query: torch.Tensor,
    kept: KeptCall,
    codes: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One softmax over the kept tokens and the codes, in float32; one kernel on a GPU.

    The codes take part as one more token of each query head: its logit is their log-sum-exp, its value their output.

    Args:
        query: [batch_size, num_heads, query_len, head_dim].
        kept: What is read of the kept tokens.
        codes: The output [batch_size, query_len, num_heads, head_dim] of attention on the codes without the model's
            sinks, and its log-sum-exp float32 [batch_size, query_len, num_heads]; None where no token sees any.
        scale: What logits are multiplied with; None is 1 / sqrt(head_dim).
        softcap: Logits become softcap * tanh(logits / softcap).
        sinks: float32 [num_heads], a logit of each head that takes weight and gives no value.

    Returns:
        [batch_size, query_len, num_heads, head_dim], of the query's type.
    """
    # What torch.compile traces it fuses by itself.
    if query.is_cuda and not torch.compiler.is_compiling():
        from turboquant_hf.merge_kernel import attend_kept as triton_attend_kept

        return triton_attend_kept(query, kept, codes, scale=scale, softcap=softcap, sinks=sinks)
    return reference_attend_kept(query, kept, codes, scale=scale, softcap=softcap, sinks=sinks)


def reference_attend_kept(
    query: torch.Tensor,
    kept: KeptCall,
    codes: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See `attend_kept`, in plain PyTorch."""
    batch_size, num_heads, query_len, head_dim = query.shape
    num_kv_heads, num_kept = kept.keys.shape[1:3]
    grouped = (batch_size, num_kv_heads, -1, head_dim)
    factor = head_dim**-0.5 if scale is None else scale
    logits = (query.float() * factor).reshape(grouped) @ kept.keys.float().transpose(2, 3)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    parts = [logits.view(batch_size, num_heads, query_len, num_kept) + kept.bias[:, None]]
    if codes is not None:
        parts.append(codes[1].transpose(1, 2)[..., None])
    if sinks is not None:
        parts.append(sinks.view(1, -1, 1, 1).expand(batch_size, -1, query_len, 1))
    weights = torch.cat(parts, dim=-1).softmax(-1) if len(parts) > 1 else parts[0].softmax(-1)
    output = weights[..., :num_kept].reshape(*grouped[:3], num_kept) @ kept.values.float()
    output = output.view(query.shape).transpose(1, 2)
    if codes is not None:
        output = output + weights[..., num_kept].transpose(1, 2)[..., None] * codes[0]
    return output.to(query.dtype)
