"""What every operation checks and asks alike."""

import os
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Generic, ParamSpec, TypeVar

import torch

from turboquant_core.config import WHOLE_BITS
from turboquant_core.key_transform import KeyTransform, tensor_types
from turboquant_core.layout import KVCacheLayout
from turboquant_core.scale import SCALE_DTYPE

VECTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Lengths of prompts differ without end.
MAX_KNOWN_CALLS = 1024

P = ParamSpec("P")
T = TypeVar("T")


class KnownCalls(Generic[T]):
    """What follows from types, shapes, strides and devices of an operation's arguments, found once for each of them.

    Checking arguments and choosing a kernel takes the host longer than to launch it, and the layers of a model ask the
    same at every step.
    """

    def __init__(self) -> None:
        self._found: dict[Hashable, T] = {}

    def look_up(self, options: Hashable, tensors: Iterable[torch.Tensor | None], find: Callable[[], T]) -> T:
        """What `find` returned for these options and for tensors like these; what it raises is raised every time."""
        # All that checks look at but where the memory is.
        described = [None if x is None else (x.dtype, x.shape, x.stride(), x.device) for x in tensors]
        call = (interpreting(), options, *described)
        try:
            return self._found[call]
        except KeyError:
            pass
        if len(self._found) >= MAX_KNOWN_CALLS:
            self._found.clear()
        found = self._found[call] = find()
        return found


def not_traced(operation: Callable[P, T]) -> Callable[P, T]:
    """Have torch.compile call an operation as it is, between compiled parts: its plan hangs on where tensors are."""
    called: Callable[P, T] = torch.compiler.disable(operation)  # type: ignore[no-untyped-call]
    return called


def check_has_kernels(layout: KVCacheLayout) -> None:
    """Raise ValueError for a layout with fractional bits, or with keys and values of different sizes."""
    config = layout.config
    if config.value_head_dim is not None:
        raise ValueError(
            f"keys have {config.head_dim} channels and values {config.value_head_dim}; cache operations take one "
            "head_dim. Quantise them by `turboquant_core.split.quantizer_of` instead."
        )
    for name in ("key_bits", "value_bits"):
        bits = getattr(config, name)
        if bits != int(bits):
            known = ", ".join(map(str, WHOLE_BITS))
            raise ValueError(f"{name} is {bits}; cache operations store whole bits. Use one of {known}.")


def check_pages(pages: torch.Tensor, layout: KVCacheLayout) -> None:
    """Raise ValueError unless the layout's fields can be addressed in `pages`."""
    shape = (layout.num_kv_heads, layout.head_bytes)
    check_tensor("pages", pages, torch.uint8, (-1, *shape))
    width = SCALE_DTYPE.itemsize
    if pages.stride(2) != 1 or any(at % width for at in (*pages.stride()[:2], pages.data_ptr())):
        raise ValueError(
            f"pages have strides {list(pages.stride())} and start at byte {pages.storage_offset()}; the last stride "
            "must be 1, and the others and the start even, where float16 scales lie."
        )


def check_tensor(name: str, x: torch.Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless x has that type and shape; -1 stands for any size."""
    fits = x.ndim == len(shape) and all(want in (-1, size) for want, size in zip(shape, x.shape, strict=True))
    if x.dtype != dtype or not fits:
        expected = ", ".join("any" if size == -1 else str(size) for size in shape)
        raise ValueError(f"{name} is {x.dtype} {list(x.shape)}; it must be {dtype} [{expected}]")


def check_is_key_transform(key_transform: object) -> None:
    """Raise TypeError for what is no transform of keys, such as None or the mean itself."""
    if not isinstance(key_transform, KeyTransform):
        raise TypeError(
            f"key_transform is a {type(key_transform).__name__}; it must be a KeyTransform. "
            "Leave it out for keys as they are, or write KeyTransform(mean)."
        )


def check_key_transform(tensors: Mapping[str, torch.Tensor], layout: KVCacheLayout, rows: int | None = None) -> None:
    """Raise ValueError unless the tensors of a transform are for keys of this layout; with `rows`, or one for each."""
    types = tensor_types(layout.num_kv_heads, layout.config.head_dim)
    for name, tensor in tensors.items():
        dtype, shape = types[name]
        if rows is not None and tensor.ndim > len(shape):
            shape = (rows, *shape)
        check_tensor(name, tensor, dtype, shape)


def check_vector_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError for a type that vectors do not come in."""
    if dtype not in VECTOR_DTYPES:
        raise ValueError(f"{name} is {dtype}; it must be one of {', '.join(map(str, VECTOR_DTYPES))}")


def check_rows(name: str, x: torch.Tensor) -> None:
    """Raise ValueError unless every vector of x lies together."""
    if x.stride(-1) != 1:
        raise ValueError(f"{name} has strides {list(x.stride())}; the last must be 1. Call contiguous() on it.")


def check_one_device(tensors: Mapping[str, torch.Tensor | None]) -> None:
    """Raise ValueError unless all the tensors given are on one device."""
    devices = {name: str(x.device) for name, x in tensors.items() if x is not None}
    if len(set(devices.values())) > 1:
        placed = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"tensors are on different devices: {placed}. Move them to one.")


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


# Every call of an operation asks, and looking for a module takes longer than to launch a kernel.
@cache
def has_gluon(generation: str) -> bool:
    """Whether this Triton has Gluon for a generation of NVIDIA's cards, such as "ampere"."""
    try:
        return find_spec(f"triton.experimental.gluon.language.nvidia.{generation}") is not None
    except ModuleNotFoundError:
        return False
