"""The ways to quantise and store new keys and values, and which one is taken.

- warpgroup: Gluon; one rotation in tensor cores, codes looked up in the lanes of a warp. NVIDIA sm_90; 2 to 4 bits.
- triton: Triton; any card that it compiles for, and its interpreter.
- reference: plain PyTorch, on any device.
"""

import torch

from turboquant_core.key_transform import KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._path import choose
from turboquant_core.ops.cache_update.path import UpdatePath
from turboquant_core.ops.cache_update.triton import TRITON
from turboquant_core.ops.cache_update.warpgroup import WARPGROUP

PATHS = (WARPGROUP, TRITON)
"""Fastest first; the last one takes everything."""


def choose_path(
    name: str,
    layout: KVCacheLayout,
    key_transform: KeyTransform,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
) -> UpdatePath | None:
    """The path that a name means for these tensors; see `turboquant_core.ops._path.choose`."""
    fastest_first = (path for path in PATHS if len(key) >= path.least_tokens)

    def obstacle(path: UpdatePath) -> str | None:
        return path.obstacle(layout, key_transform, key, value, pages)

    return choose(name, PATHS, fastest_first, key.device, obstacle)
