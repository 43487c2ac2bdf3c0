"""The header of a safetensors file, and single tensors by their byte range, from any file that can be read in parts."""

import json
from typing import Any, BinaryIO, NamedTuple

import torch

MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        entries: dict[str, Any] = json.loads(file.read(header_bytes))
        ranges = {
            tensor: TensorRange(entry["dtype"], *(first + at for at in entry["data_offsets"]))
            for tensor, entry in entries.items()
            if tensor != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} has no readable safetensors header ({error}). Download it again.") from None
    last = max((tensor.stop for tensor in ranges.values()), default=first)
    if last > file_bytes:
        raise ValueError(
            f"{name} has {file_bytes:,} bytes and its tensors end at byte {last:,}: the file is truncated. Download it "
            "again."
        )
    return ranges


def read_floats(file: BinaryIO, tensor: TensorRange) -> torch.Tensor:
    """The numbers of one tensor, float32 [num_elements].

    Raises:
        ValueError: If they are of another type than those of `FLOAT_DTYPES`.
    """
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"a tensor is {tensor.dtype}; it must be one of {', '.join(FLOAT_DTYPES)}")
    file.seek(tensor.start)
    data = bytearray(file.read(tensor.stop - tensor.start))
    return torch.frombuffer(data, dtype=FLOAT_DTYPES[tensor.dtype]).float()
