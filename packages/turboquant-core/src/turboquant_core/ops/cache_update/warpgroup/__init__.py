"""`cache_update` by warpgroups, in Gluon: one rotation in tensor cores, codes looked up in the lanes of a warp."""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops.cache_update.path import VECTOR_ALIGNMENT, Launch, UpdatePath

# Codes are stored in words.
WORD_BYTES = 4


def _plan(
    layout: KVCacheLayout, dtype: torch.dtype, num_tokens: int, device: torch.device, only_centres: bool
) -> Launch:
    from turboquant_core.ops.cache_update.warpgroup.launch import plan

    return plan(layout, dtype, num_tokens, device)


WARPGROUP = UpdatePath(
    name="warpgroup",
    plan=_plan,
    head_dims=(64, 128),
    key_bits=(2, 3, 4),
    value_bits=(2, 3, 4),
    capability=(9, 0),
    newest_capability=(9, 0),
    gluon="hopper",
    only_centres=True,
    dtypes=(torch.float16, torch.bfloat16),
    vector_alignment=VECTOR_ALIGNMENT,
    page_alignment=WORD_BYTES,
    # A tile of 64 tokens is mostly empty below.
    least_tokens=17,
)
