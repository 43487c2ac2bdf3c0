"""The ways to quantise and store new keys and values, and which one is taken.

- warpgroup: Gluon; one rotation in tensor cores, codes looked up in the lanes of a warp. NVIDIA sm_90; 2 to 4 bits.
- triton: Triton; any card that it compiles for, and its interpreter.
- reference: plain PyTorch, on any device.
"""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._path import find_path, refuse_path
from turboquant_core.ops.cache_update.path import UpdatePath
from turboquant_core.ops.cache_update.triton import TRITON
from turboquant_core.ops.cache_update.warpgroup import WARPGROUP

PATHS = (WARPGROUP, TRITON)
"""Fastest first; the last one takes everything."""


def choose_path(
    name: str, layout: KVCacheLayout, key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor
) -> UpdatePath | None:
    """The path that a name means: itself, or for "auto" the fastest for these tensors; None for the reference.

    Raises:
        ValueError: If there is no such path or it cannot run there; the message says why.
    """
    path = find_path(name, PATHS)
    if path is not None:
        if reason := path.obstacle(layout, key, value, pages):
            raise refuse_path(path, reason)
        return path
    if name == "reference" or key.device.type != "cuda":
        return None
    return next(
        path for path in PATHS if len(key) >= path.least_tokens and path.obstacle(layout, key, value, pages) is None
    )
