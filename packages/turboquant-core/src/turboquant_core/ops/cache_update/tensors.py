"""What the kernels that store take."""

from typing import NamedTuple

import torch


class UpdateTensors(NamedTuple):
    """Tensors and their strides, in elements, as one argument of a kernel.

    Attributes:
        key: [num_tokens, num_kv_heads, head_dim], the last stride 1.
        value: The same for values.
        key_mean: float32 [num_kv_heads, head_dim], contiguous; None without one.
        slot_mapping: int64 [num_tokens].
        pages: uint8 [num_blocks, num_kv_heads, head_bytes], written.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_mean: torch.Tensor | None
    slot_mapping: torch.Tensor
    pages: torch.Tensor
    key_token_stride: int
    key_head_stride: int
    value_token_stride: int
    value_head_stride: int
    slot_stride: int
    page_stride: int
    page_head_stride: int

    @classmethod
    def of(
        cls,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mean: torch.Tensor | None,
        slot_mapping: torch.Tensor,
        pages: torch.Tensor,
    ) -> "UpdateTensors":
        """The tensors with their strides."""
        return cls(
            key,
            value,
            key_mean if key_mean is None else key_mean.contiguous(),
            slot_mapping,
            pages,
            *key.stride()[:2],
            *value.stride()[:2],
            *slot_mapping.stride(),
            *pages.stride()[:2],
        )
