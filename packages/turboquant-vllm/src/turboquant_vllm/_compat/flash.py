"""vLLM's kernels for attention on dense keys and values, which are on GPUs alone."""

from typing import Any

import torch


def flash_version(head_size: int, has_sinks: bool) -> int | None:
    """The version of FlashAttention that serves such heads on this GPU, or None."""
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version: int | None = get_flash_attn_version(head_size=head_size, has_sinks=has_sinks)
    return version


def flash_attention(**arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and the log-sum-exp of `flash_attn_varlen_func`."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    out, lse = flash_attn_varlen_func(return_softmax_lse=True, **arguments)
    return out, lse


def merge_on_gpu(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor
) -> torch.Tensor:
    """Merge outputs and log-sum-exps on two sets of keys: write `out` and return the log-sum-exp."""
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    lse = torch.empty_like(first[1])
    merge_attn_states(out, *first, *second, lse)
    return lse
