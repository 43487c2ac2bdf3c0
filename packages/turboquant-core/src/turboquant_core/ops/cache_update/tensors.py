"""What the kernels that store take."""

from typing import NamedTuple

import torch

from turboquant_core.key_transform import KeyTransform


class UpdateTensors(NamedTuple):
    """Tensors and their strides, in elements, as one argument of a kernel.

    Attributes:
        key: [num_tokens, num_kv_heads, head_dim], the last stride 1.
        value: The same for values.
        key_mean: float32 [num_kv_heads, head_dim], contiguous, what keys go through; None without one.
        key_scale: The same, after it.
        key_order: int64 of the same shape, after both.
        slot_mapping: int64 [num_tokens].
        pages: uint8 [num_blocks, num_kv_heads, head_bytes], written.
    """

    key: torch.Tensor
    value: torch.Tensor
    key_mean: torch.Tensor | None
    key_scale: torch.Tensor | None
    key_order: torch.Tensor | None
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
        key_transform: KeyTransform,
        slot_mapping: torch.Tensor,
        pages: torch.Tensor,
    ) -> "UpdateTensors":
        """The tensors with their strides."""
        mean, scale, order = (None if part is None else part.contiguous() for part in key_transform.parts)
        return cls(
            key,
            value,
            mean,
            scale,
            order,
            slot_mapping,
            pages,
            *key.stride()[:2],
            *value.stride()[:2],
            *slot_mapping.stride(),
            *pages.stride()[:2],
        )
