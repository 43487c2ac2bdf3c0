"""`merge_attention` in plain PyTorch."""

import torch


def merge_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor,
    codes: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    scale: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See `turboquant_core.ops.merge_attention`."""
    batch_size, num_heads, query_len, head_dim = query.shape
    num_kv_heads, num_dense = keys.shape[1:3]
    grouped = (batch_size, num_kv_heads, -1, head_dim)
    factor = head_dim**-0.5 if scale is None else scale
    logits = (query.float() * factor).reshape(grouped) @ keys.float().transpose(2, 3)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    parts = [logits.view(batch_size, num_heads, query_len, num_dense) + bias[:, None]]
    if codes is not None:
        parts.append(codes[1].transpose(1, 2)[..., None])
    if sinks is not None:
        parts.append(sinks.view(1, -1, 1, 1).expand(batch_size, -1, query_len, 1))
    weights = torch.cat(parts, dim=-1).softmax(-1) if len(parts) > 1 else parts[0].softmax(-1)
    output = weights[..., :num_dense].reshape(*grouped[:3], num_dense) @ values.float()
    output = output.view(query.shape).transpose(1, 2)
    if codes is not None:
        output = output + weights[..., num_dense].transpose(1, 2)[..., None] * codes[0]
    return output.to(query.dtype).contiguous()
