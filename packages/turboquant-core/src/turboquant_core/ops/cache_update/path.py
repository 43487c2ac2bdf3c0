"""What a path of `cache_update` is."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from turboquant_core.key_transform import KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._dispatch import VECTOR_DTYPES
from turboquant_core.ops._path import Path
from turboquant_core.ops.cache_update.tensors import UpdateTensors

# Copies are of sixteen bytes, and Triton sees strides to be multiples of sixteen elements.
VECTOR_ALIGNMENT = 16

Tensor = torch.Tensor
Launch = Callable[[UpdateTensors, int, int], None]


@dataclass(frozen=True, kw_only=True)
class UpdatePath(Path):
    """One way to quantise and store keys and values.

    Attributes:
        plan: The launch for a layout, a type of keys, a number of them, a device, and whether a mean is all that
            keys go through: it takes tensors, how many tokens those have, and how many pages.
        dtypes: Types of keys and values.
        vector_alignment: What addresses of keys and values, and strides in elements, are multiples of.
        page_alignment: What those of pages are, in bytes.
        only_centres: Whether it takes no transform of keys but their mean.
        least_tokens: Fewer are left to the next path, unless this one is asked for.
    """

    plan: Callable[[KVCacheLayout, torch.dtype, int, torch.device, bool], Launch]
    dtypes: tuple[torch.dtype, ...] = VECTOR_DTYPES
    vector_alignment: int = 1
    page_alignment: int = 1
    only_centres: bool = False
    least_tokens: int = 0

    def obstacle(
        self, layout: KVCacheLayout, key_transform: KeyTransform, key: Tensor, value: Tensor, pages: Tensor
    ) -> str | None:
        """Why it cannot run for a layout, a transform and these tensors; None if it can."""
        if reason := self.device_obstacle(layout, key.device):
            return reason
        if self.only_centres and not key_transform.only_centres:
            return "keys go through a scale or an order, and it takes a mean alone"
        if key.dtype not in self.dtypes:
            return f"key is {key.dtype}, and it takes {', '.join(map(str, self.dtypes))}"
        for name, x, alignment in (
            ("key", key, self.vector_alignment),
            ("value", value, self.vector_alignment),
            ("pages", pages, self.page_alignment),
        ):
            if any(at % alignment for at in (*x.stride()[:2], x.data_ptr())):
                return (
                    f"{name} starts at {x.data_ptr():#x} with strides {list(x.stride())}, and it takes multiples of "
                    f"{alignment}"
                )
        return None
