"""Which implementation of the cache update runs where."""

from typing import Literal, get_args

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._dispatch import has_gluon, interpreting, runs_triton

UpdateImplementation = Literal["warpgroup", "triton", "reference"]
UpdatePath = Literal["auto", "warpgroup", "triton", "reference"]
"""How new keys and values are quantised.

- warpgroup: Gluon; one rotation in tensor cores, codes looked up in the lanes of a warp. NVIDIA sm_90; 2 to 4 bits.
- triton: Triton; any card that it compiles for, and its interpreter.
- reference: plain PyTorch, on any device.
"""

WARPGROUP_CAPABILITY = (9, 0)
WARPGROUP_HEAD_DIMS = (64, 128)
WARPGROUP_BITS = (2, 3, 4)
WARPGROUP_DTYPES = (torch.float16, torch.bfloat16)
# Copies are of sixteen bytes, and Triton sees strides to be multiples of sixteen elements.
WARPGROUP_ALIGNMENT = 16
# Codes are stored in words.
WORD_BYTES = 4
# A tile of 64 tokens is mostly empty below.
WARPGROUP_MIN_TOKENS = 17


def choose_update_path(
    path: UpdatePath, layout: KVCacheLayout, key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor
) -> UpdateImplementation:
    """The path that a name means: itself, or for "auto" the fastest for these tensors.

    Raises:
        ValueError: If there is no such path or it cannot run there; the message says why.
    """
    if path not in get_args(UpdatePath):
        raise ValueError(f"path is {path!r}; it must be one of {', '.join(get_args(UpdatePath))}")
    if path == "warpgroup":
        if reason := warpgroup_obstacle(layout, key, value, pages):
            raise ValueError(f"path is 'warpgroup', which cannot run here: {reason}. Use path='auto'.")
        return path
    if not runs_triton(path, key.device):
        return "reference"
    small = key.shape[0] < WARPGROUP_MIN_TOKENS
    return (
        "warpgroup"
        if path == "auto" and not small and warpgroup_obstacle(layout, key, value, pages) is None
        else "triton"
    )


def warpgroup_obstacle(
    layout: KVCacheLayout, key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor
) -> str | None:
    """Why the warpgroup kernel cannot run for this layout and these tensors; None if it can."""
    if interpreting():
        return "Gluon has no interpreter"
    if key.device.type != "cuda":
        return f"the tensors are on {key.device.type}, and kernels need CUDA"
    if torch.version.hip is not None:
        return "its instructions are NVIDIA's"
    capability = torch.cuda.get_device_capability(key.device)
    if capability != WARPGROUP_CAPABILITY:
        return f"the card is sm_{capability[0]}{capability[1]}, and it needs sm_90"
    if reason := _layout_obstacle(layout) or _tensor_obstacle(key, value, pages):
        return reason
    return None if has_gluon("hopper") else "this Triton has no Gluon for sm_90; 3.6 has"


def _layout_obstacle(layout: KVCacheLayout) -> str | None:
    config = layout.config
    if config.head_dim not in WARPGROUP_HEAD_DIMS:
        return f"head_dim is {config.head_dim}, and it takes {' and '.join(map(str, WARPGROUP_HEAD_DIMS))}"
    for name in ("key_bits", "value_bits"):
        if (bits := getattr(config, name)) not in WARPGROUP_BITS:
            return f"{name} is {bits}, and it takes {', '.join(map(str, WARPGROUP_BITS))}"
    return None


def _tensor_obstacle(key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor) -> str | None:
    if key.dtype not in WARPGROUP_DTYPES:
        return f"key is {key.dtype}, and it takes {' and '.join(map(str, WARPGROUP_DTYPES))}"
    for name, x, alignment in (
        ("key", key, WARPGROUP_ALIGNMENT),
        ("value", value, WARPGROUP_ALIGNMENT),
        ("pages", pages, WORD_BYTES),
    ):
        if any(at % alignment for at in (*x.stride()[:2], x.data_ptr())):
            return (
                f"{name} starts at {x.data_ptr():#x} with strides {list(x.stride())}, and it takes multiples of "
                f"{alignment}"
            )
    return None
