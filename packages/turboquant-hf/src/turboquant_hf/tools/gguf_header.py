"""Whether a GGUF file is whole: what reads it believes its counts, and never ends or reads past the end if they lie."""

import math
import mmap
import struct
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGMLQuantizationType, GGUFValueType
from gguf.constants import GGUFEndian

_VERSIONS = (2, 3)
_MAX_DIMS = 4
# Arrays of arrays exist; nobody writes deeper ones.
_MAX_ARRAY_DEPTH = 2

_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "B",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}


def check_gguf(path: Path) -> dict[str, int | float]:
    """Refuse a GGUF file of which anything lies beyond its end; tensors are not read.

    Args:
        path: The file.

    Returns:
        Its single numbers, by name.

    Raises:
        OSError: If the file is cut off, damaged or something else.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).check()
    except (ValueError, struct.error) as error:
        raise OSError(f"{path} is cut off, damaged or no GGUF file ({error}). Download it again.") from error


class _Header:
    """What is before the tensors, read from the start on."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.order = data, 0, GGUFEndian.LITTLE
        self.numbers: dict[str, int | float] = {}

    def check(self) -> dict[str, int | float]:
        if self.scalar("I") != GGUF_MAGIC:
            raise ValueError("it does not begin as one")
        version = self.scalar("I")
        if version & 0xFFFF == 0:
            self.order, self.at = GGUFEndian.BIG, self.at - 4
            version = self.scalar("I")
        if version not in _VERSIONS:
            raise ValueError(f"its version is {version}, and {_VERSIONS} are read")
        num_tensors, num_fields = self.scalar("Q"), self.scalar("Q")
        for _ in range(num_fields):
            self.field(self.text())
        self.tensors(num_tensors)
        return self.numbers

    def field(self, name: str) -> None:
        kind = GGUFValueType(self.scalar("I"))
        if kind in _SCALARS:
            self.numbers[name] = self.scalar(_SCALARS[kind])
        else:
            self.skip(kind, 0)

    def skip(self, kind: GGUFValueType, depth: int) -> None:
        if kind == GGUFValueType.STRING:
            self.move(self.scalar("Q"))
            return
        if kind != GGUFValueType.ARRAY or depth == _MAX_ARRAY_DEPTH:
            raise ValueError(f"a field has {kind.name} inside {depth} arrays")
        inner, length = GGUFValueType(self.scalar("I")), self.scalar("Q")
        if inner in _SCALARS:
            self.move(length * struct.calcsize(_SCALARS[inner]))
            return
        for _ in range(length):
            self.skip(inner, depth + 1)

    def tensors(self, count: int) -> None:
        ends = [0]
        total = 0
        for _ in range(count):
            name, num_dims = self.text(), self.scalar("I")
            if num_dims > _MAX_DIMS:
                raise ValueError(f"tensor {name:.80} has {num_dims} dimensions")
            dims = [self.scalar("Q") for _ in range(num_dims)]
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.scalar("I"))]
            if dims and dims[0] % block:
                raise ValueError(f"tensor {name:.80} has rows of {dims[0]} numbers, stored {block} at a time")
            nbytes = math.prod(dims) // block * block_bytes
            total += nbytes
            ends.append(self.scalar("Q") + nbytes)
        alignment = self.numbers.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment}, no power of two")
        start = -(-self.at // alignment) * alignment
        if max(start + max(ends), start + total) > len(self.data):
            raise ValueError(f"it has {len(self.data):,} bytes, and its tensors end at byte {start + max(ends):,}")

    def text(self) -> str:
        length = self.scalar("Q")
        start = self.at
        self.move(length)
        return self.data[start : self.at].decode()

    def scalar(self, kind: str) -> int:
        code = ("<" if self.order == GGUFEndian.LITTLE else ">") + kind
        (value,) = struct.unpack_from(code, self.data, self.at)
        self.at += struct.calcsize(code)
        found: int = value
        return found

    def move(self, nbytes: int) -> None:
        self.at += nbytes
        if self.at > len(self.data):
            raise ValueError(f"it has {len(self.data):,} bytes, and a field ends at byte {self.at:,}")
