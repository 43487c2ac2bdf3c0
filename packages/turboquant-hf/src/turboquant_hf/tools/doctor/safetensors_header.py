"""The header of a safetensors file, and single tensors by their byte range, from any file that can be read in parts."""

import math
from typing import Any, BinaryIO, NamedTuple, TypeGuard

import torch

from turboquant_core.files import parse_json

MAX_HEADER_BYTES = 100_000_000
# The bias of a layer is a few thousand numbers.
MAX_READ_BYTES = 1 << 26
_LENGTH_BYTES = 8

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ITEMSIZES = {
    **{dtype: kind.itemsize for dtype, kind in FLOAT_DTYPES.items()},
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16"), 2),
    **dict.fromkeys(("U32", "I32"), 4),
    **dict.fromkeys(("U64", "I64", "C64"), 8),
}


class TensorRange(NamedTuple):
    """Where a tensor lies in its file.

    Attributes:
        dtype: As the format names it, such as "BF16".
        start: First byte, from the start of the file.
        stop: The byte after the last.
    """

    dtype: str
    start: int
    stop: int


def read_header(file: BinaryIO, name: str) -> dict[str, TensorRange]:
    """Every tensor of a file; no other byte than the header's is read.

    Args:
        file: Opened at any position.
        name: For messages.

    Raises:
        ValueError: If the file is truncated or something else.
    """
    file_bytes = file.seek(0, 2)
    file.seek(0)
    header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
    first = _LENGTH_BYTES + header_bytes
    if file_bytes < _LENGTH_BYTES or first > file_bytes:
        raise ValueError(
            f"{name} has {file_bytes:,} bytes and its safetensors header ends at byte {first:,}: the file is truncated "
            "or something else. Download it again."
        )
    if header_bytes > MAX_HEADER_BYTES:
        raise ValueError(f"{name} has a header of {header_bytes:,} bytes; safetensors allows {MAX_HEADER_BYTES:,}")
    try:
        ranges = _ranges(parse_json(file.read(header_bytes), MAX_HEADER_BYTES), first)
    except ValueError as error:
        raise ValueError(f"{name} has no readable safetensors header ({error!s:.300}). Download it again.") from None
    last = max((tensor.stop for tensor in ranges.values()), default=first)
    if last != file_bytes:
        raise ValueError(
            f"{name} has {file_bytes:,} bytes and its tensors end at byte {last:,}: the file is "
            f"{'truncated' if last > file_bytes else 'damaged'}. Download it again."
        )
    return ranges


def _ranges(header: Any, first: int) -> dict[str, TensorRange]:
    """Every tensor of a header whose tensors begin at byte `first` and lie one after another, as the format has it."""
    if not isinstance(header, dict):
        raise ValueError("it is no JSON object")
    ranges = {name: _range(name, entry, first) for name, entry in header.items() if name != "__metadata__"}
    at = first
    for name, tensor in sorted(ranges.items(), key=lambda item: item[1][1:]):
        if tensor.start != at:
            raise ValueError(f"tensor {name!r} begins at byte {tensor.start - first:,}, not {at - first:,}")
        at = tensor.stop
    return ranges


def _range(name: str, entry: Any, first: int) -> TensorRange:
    found = entry if isinstance(entry, dict) else {}
    dtype, offsets = found.get("dtype"), found.get("data_offsets")
    shape = found.get("shape")
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} is {entry!r}")
    start, stop = offsets
    # Types that come after this was written have sizes that it does not know.
    if start > stop or (dtype in ITEMSIZES and stop - start != ITEMSIZES[dtype] * math.prod(shape)):
        raise ValueError(f"tensor {name!r} is {dtype} {shape} in the bytes {offsets}")
    return TensorRange(dtype, first + start, first + stop)


def _are_sizes(numbers: Any) -> TypeGuard[list[int]]:
    return isinstance(numbers, list) and all(type(number) is int and number >= 0 for number in numbers)


def read_floats(file: BinaryIO, tensor: TensorRange) -> torch.Tensor:
    """The numbers of one tensor, float32 [num_elements].

    Raises:
        ValueError: If they are of another type than those of `FLOAT_DTYPES`, or too many.
    """
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"a tensor is {tensor.dtype}; it must be one of {', '.join(FLOAT_DTYPES)}")
    if tensor.stop - tensor.start > MAX_READ_BYTES:
        raise ValueError(f"a tensor has {tensor.stop - tensor.start:,} bytes; only small ones are read here")
    file.seek(tensor.start)
    data = bytearray(file.read(tensor.stop - tensor.start))
    return torch.frombuffer(data, dtype=FLOAT_DTYPES[tensor.dtype]).float()
