"""`cache_update` in Triton: any card that it compiles for, and its interpreter."""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops.cache_update.path import Launch, UpdatePath


def _plan(
    layout: KVCacheLayout, dtype: torch.dtype, num_tokens: int, device: torch.device, only_centres: bool
) -> Launch:
    from turboquant_core.ops.cache_update.triton.launch import plan

    return plan(layout, dtype, num_tokens, device, only_centres)


TRITON = UpdatePath(name="triton", plan=_plan, splits_keys=True)
