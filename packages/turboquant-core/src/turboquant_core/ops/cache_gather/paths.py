"""The ways to dequantise tokens of a cache, and which one is taken.

- triton: Triton; any card that it compiles for, and its interpreter.
- reference: plain PyTorch, on any device.
"""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._path import Path, choose

TRITON = Path(name="triton", splits_keys=True)
PATHS = (TRITON,)


def choose_path(name: str, layout: KVCacheLayout, device: torch.device) -> Path | None:
    """The path that a name means for a layout; see `turboquant_core.ops._path.choose`."""
    return choose(name, PATHS, PATHS, device, lambda path: path.device_obstacle(layout, device))
