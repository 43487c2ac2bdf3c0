"""The ways to attend on codes, and which one is taken.

- fragment: Gluon; keys as int8, the query in two int8 parts, looked up in the tensor cores' own registers. NVIDIA from
  sm_80 on.
- fp16: Triton; float16 centroids by byte permute. NVIDIA from sm_75 on.
- int8: Triton; keys as int8 centroids, the query in two int8 parts. NVIDIA from sm_75 on.
- fp8: Triton; keys as e4m3 centroids, the query in two e4m3 parts. NVIDIA from sm_89 on.
- portable: Triton without inline assembly; any card that Triton compiles for.
- reference: plain PyTorch, on any device.

Values are float16 centroids in every one. In Triton's interpreter all but "fragment" run, with the same tables.
"""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._path import choose
from turboquant_core.ops.decode_attention.fragment import FRAGMENT
from turboquant_core.ops.decode_attention.path import DecodePath
from turboquant_core.ops.decode_attention.portable import FP8, FP16, INT8, PORTABLE

PATHS = (FRAGMENT, FP16, INT8, FP8, PORTABLE)
FASTEST_FIRST = (FRAGMENT, FP16, PORTABLE)
"""What "auto" takes the first of that can run; the last one takes everything."""


def choose_path(
    name: str, layout: KVCacheLayout, device: torch.device, pages: torch.Tensor | None = None
) -> DecodePath | None:
    """The path that a name means, for these pages where they are known; see `turboquant_core.ops._path.choose`."""
    return choose(name, PATHS, FASTEST_FIRST, device, lambda path: path.obstacle(layout, device, pages))
