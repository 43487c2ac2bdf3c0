"""What a path of `decode_attention` is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._card import Card
from turboquant_core.ops._path import Path
from turboquant_core.ops.decode_attention.call import AttendCall, AttendEnds, AttendTensors
from turboquant_core.ops.decode_attention.sizes import DecodeLaunch, DecodeShape

Attend = Callable[[AttendTensors, AttendEnds], None]
"""The launches of a planned call."""


@dataclass(frozen=True, kw_only=True)
class DecodePath(Path):
    """One way to attend on codes.

    Attributes:
        plan: The launches of a call.
        launch_of: Their sizes for a call on a card.
        page_alignment: What addresses and strides of pages are multiples of, in bytes.
    """

    plan: Callable[[AttendCall], Attend]
    launch_of: Callable[[DecodeShape, Card], DecodeLaunch]
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
