"""The ways to dequantise tokens of a cache, and which one is taken.

- triton: Triton; any card that it compiles for, and its interpreter.
- reference: plain PyTorch, on any device.
"""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._path import Path, find_path, refuse_path

TRITON = Path(name="triton")
PATHS = (TRITON,)


def choose_path(name: str, layout: KVCacheLayout, device: torch.device) -> Path | None:
    """The path that a name means: itself, or for "auto" the fastest that can run; None for the reference.

    Raises:
        ValueError: If there is no such path or it cannot run there; the message says why.
    """
    path = find_path(name, PATHS)
    if path is not None and (reason := path.device_obstacle(layout, device)):
        raise refuse_path(path, reason)
    return TRITON if name == "auto" and device.type == "cuda" else path
