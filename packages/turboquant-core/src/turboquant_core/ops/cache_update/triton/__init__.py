"""`cache_update` in Triton: any card that it compiles for, and its interpreter."""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops.cache_update.path import UpdatePath


def _launch(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    layout: KVCacheLayout,
    key_mean: torch.Tensor | None,
) -> None:
    from turboquant_core.ops.cache_update.triton.launch import launch

    launch(key, value, pages, slot_mapping, layout, key_mean)


TRITON = UpdatePath(name="triton", launch=_launch)
