"""What a path of `decode_attention` is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._path import Path
from turboquant_core.ops.decode_attention.call import AttendCall, AttendTensors
from turboquant_core.ops.decode_attention.sizes import Card, DecodeLaunch, DecodeShape

Attend = Callable[[AttendTensors], None]


@dataclass(frozen=True)
class Operand:
    """How a path takes a query, and what its results are multiples of.

    Attributes:
        query_channels: Which channel each position of the operand is; -1 for padding.
        output_channels: Which channel each position of a partial result is.
        key_unit: What a looked-up key is multiplied with, after `key_offset`, to be that of a unit vector.
        value_unit: What a partial result is multiplied with, to be that of unit vectors.
        steps: Of a query's coordinate at the length of the query, for int8 in two parts of seven bits; 0 for float16.
        key_offset: What is added to a looked-up key.
    """

    query_channels: tuple[int, ...]
    output_channels: tuple[int, ...]
    key_unit: float
    value_unit: float
    steps: int = 0
    key_offset: float = 0.0


@dataclass(frozen=True, kw_only=True)
class DecodePath(Path):
    """One way to multiply with codes, between preparing a query and combining partial results.

    Attributes:
        plan: What writes the partial results of a call from its prepared tensors.
        launch_of: The sizes of the launch for a call on a card.
        operand: How it takes a query, by head_dim, key bits and value bits.
        page_alignment: What addresses and strides of pages are multiples of, in bytes.
    """

    plan: Callable[[AttendCall], Attend]
    launch_of: Callable[[DecodeShape, Card], DecodeLaunch]
    operand: Callable[[int, int, int], Operand]
    page_alignment: int = 1

    def obstacle(self, layout: KVCacheLayout, device: torch.device, pages: torch.Tensor | None = None) -> str | None:
        """Why it cannot run for a layout on a device, and these pages where they are known; None if it can."""
        if reason := self.device_obstacle(layout, device):
            return reason
        if pages is not None and any(at % self.page_alignment for at in (*pages.stride()[:2], pages.data_ptr())):
            return (
                f"pages start at {pages.data_ptr():#x} with strides {list(pages.stride())}, and it takes multiples of "
                f"{self.page_alignment} bytes"
            )
        return None
