"""Which implementation of decode attention runs where."""

from typing import Literal, get_args

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._dispatch import has_gluon, interpreting

KernelPath = Literal["fragment", "fp16", "int8", "fp8", "portable"]
DecodePath = Literal["auto", "fragment", "fp16", "int8", "fp8", "portable", "reference"]
"""How decode attention multiplies with codes.

- fragment: Gluon; float16 centroids looked up in the tensor cores' own registers. NVIDIA from sm_80 on.
- fp16: Triton; float16 centroids by byte permute. NVIDIA from sm_75 on.
- int8: Triton; keys as int8 centroids, the query in two int8 parts. NVIDIA from sm_75 on.
- fp8: Triton; keys as e4m3 centroids, the query in two e4m3 parts. NVIDIA from sm_89 on.
- portable: Triton without inline assembly; any card that Triton compiles for.
- reference: plain PyTorch, on any device.

Values are float16 centroids in every one. In Triton's interpreter all but "fragment" run, with the same tables.
"""

SUBTILE = 16
FRAGMENT_HEAD_DIMS = (64, 128, 256)
# Widths that it looks up in registers; the other kernels gather centroids of any.
FRAGMENT_BITS = (2, 3, 4, 5, 6, 8)
# Strides in words, and in scales, that Triton sees to be multiples of sixteen.
FRAGMENT_ALIGNMENT = 64
MIN_CAPABILITY: dict[KernelPath, tuple[int, int]] = {"fragment": (8, 0), "fp16": (7, 5), "int8": (7, 5), "fp8": (8, 9)}
FASTEST_FIRST: tuple[KernelPath, ...] = ("fragment", "fp16", "portable")


def choose_path(
    path: DecodePath, layout: KVCacheLayout, device: torch.device, pages: torch.Tensor | None = None
) -> KernelPath | Literal["reference"]:
    """The path that a name means: itself, or for "auto" the fastest that can run; `pages` where they are known.

    Raises:
        ValueError: If there is no such path or it cannot run there; the message says why.
    """
    if path not in get_args(DecodePath):
        raise ValueError(f"path is {path!r}; it must be one of {', '.join(get_args(DecodePath))}")
    if path == "reference" or (path == "auto" and device.type != "cuda"):
        return "reference"
    if path == "auto":
        return next(name for name in FASTEST_FIRST if obstacle(name, layout, device, pages) is None)
    if reason := obstacle(path, layout, device, pages):
        raise ValueError(f"path is {path!r}, which cannot run here: {reason}. Use path='auto'.")
    return path


def obstacle(
    path: KernelPath, layout: KVCacheLayout, device: torch.device, pages: torch.Tensor | None = None
) -> str | None:
    """Why a kernel cannot run for this layout on this device, and these pages; None if it can."""
    if interpreting():
        return "Gluon has no interpreter" if path == "fragment" else None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, and kernels need CUDA"
    if path == "portable":
        return None
    if torch.version.hip is not None:
        return "its inline assembly is NVIDIA's"
    if reason := card_obstacle(path, layout, torch.cuda.get_device_capability(device)):
        return reason
    return _pages_obstacle(pages) if path == "fragment" else None


def card_obstacle(path: KernelPath, layout: KVCacheLayout, capability: tuple[int, int]) -> str | None:
    """Why a kernel cannot run for this layout on NVIDIA cards of a compute capability; None if it can."""
    if path == "portable":
        return None
    needed = MIN_CAPABILITY[path]
    if capability < needed:
        return f"the card is sm_{capability[0]}{capability[1]}, and it needs sm_{needed[0]}{needed[1]}"
    return _layout_obstacle(layout) if path == "fragment" else None


def _layout_obstacle(layout: KVCacheLayout) -> str | None:
    if layout.config.head_dim not in FRAGMENT_HEAD_DIMS:
        known = ", ".join(map(str, FRAGMENT_HEAD_DIMS))
        return f"head_dim is {layout.config.head_dim}, and it takes {known}"
    for name in ("key_bits", "value_bits"):
        if (bits := getattr(layout.config, name)) not in FRAGMENT_BITS:
            return f"{name} is {bits}, and it looks up {', '.join(map(str, FRAGMENT_BITS))}"
    if layout.config.value_bits == 8:
        return "value_bits is 8, whose outermost centroids its polynomial misses by more than a short row averages out"
    if layout.block_size % SUBTILE:
        return f"block_size is {layout.block_size}, and it takes multiples of {SUBTILE}"
    return None


def _pages_obstacle(pages: torch.Tensor | None) -> str | None:
    if pages is not None and any(at % FRAGMENT_ALIGNMENT for at in (*pages.stride()[:2], pages.data_ptr())):
        return (
            f"pages start at {pages.data_ptr():#x} with strides {list(pages.stride())}, and it takes multiples of "
            f"{FRAGMENT_ALIGNMENT} bytes"
        )
    if not has_gluon("ampere"):
        return "this Triton has no Gluon for sm_80; 3.6 has"
    return None
