"""vLLM's kernels for attention on dense keys and values, which are on GPUs alone."""

import torch


def flash_version(head_size: int, has_sinks: bool) -> int | None:
    """The version of FlashAttention that serves such heads on this GPU, or None."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version: int | None = get_flash_attn_version(head_size=head_size, has_sinks=has_sinks)
    return version


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    query_start_loc: torch.Tensor,
    key_start_loc: torch.Tensor,
    max_query_len: int,
    max_key_len: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    causal: bool,
    version: int,
    out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp of FlashAttention; see `turboquant_vllm.dense_attention`."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    out, lse = flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        cu_seqlens_q=query_start_loc,
        cu_seqlens_k=key_start_loc,
        max_seqlen_q=max_query_len,
        max_seqlen_k=max_key_len,
        softmax_scale=scale,
        window_size=[-1, -1] if window is None else [window - 1, 0],
        softcap=softcap or 0.0,
        s_aux=sinks,
        causal=causal,
        fa_version=version,
        out=out,
        return_softmax_lse=True,
    )
    return out, lse


def merge_on_gpu(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor
) -> torch.Tensor:
    """Merge outputs and log-sum-exps on two sets of keys: write `out` and return the log-sum-exp."""
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    lse = torch.empty_like(first[1])
    merge_attn_states(out, *first, *second, lse)
    return lse
