"""Codes to centroids in plain Triton: a gather, or byte permutes where codes have at most four bits.

A table of sixteen bytes is four words. The permute looks up the lower and the upper eight entries and the code's fourth
bit selects. Every output byte depends on its own code only, so the compiler may move the assembly anywhere.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from turboquant_core.ops.decode_attention.centroids import unit_variance_centroids

# Four codes, one a byte, to four nibbles that select; then what their fourth bits select, as bytes of ones.
_SELECT = """
    shr.u32 t, $codes, 4;
    or.b32 t, t, $codes;
    prmt.b32 s, t, 0, 0x4420;
    and.b32 s, s, 0x7777;
    shl.b32 t, $codes, 4;
    prmt.b32 m, t, 0, 0xBA98;
"""


def _look_up_byte(target: str, first: int) -> str:
    """Bytes `target` of the selected entries of the table in operands `first`, first + 4, first + 8, first + 12."""
    return f"""
    prmt.b32 x, ${first}, ${first + 4}, s;
    prmt.b32 y, ${first + 8}, ${first + 12}, s;
    lop3.b32 {target}, x, y, m, 0xD8;
"""


# Elementwise assembly on four elements takes every scalar four times.
_BYTE_ASM = "{ .reg .b32 t, s, m, x, y; " + _SELECT.replace("$codes", "$1") + _look_up_byte("$0", 2) + "}"
_HALF_ASM = (
    "{ .reg .b32 t, s, m, x, y, l, h; "
    + _SELECT.replace("$codes", "$2")
    + _look_up_byte("l", 3)
    + _look_up_byte("h", 19)
    + "prmt.b32 $0, l, h, 0x5140; prmt.b32 $1, l, h, 0x7362; }"
)
BYTE_ASM = tl.constexpr(_BYTE_ASM)
BYTE_CONSTRAINTS = tl.constexpr(",".join(["=r", "r"] + ["r"] * 16))
HALF_ASM = tl.constexpr(_HALF_ASM)
HALF_CONSTRAINTS = tl.constexpr(",".join(["=r", "=r", "r"] + ["r"] * 32))


@triton.jit
def permute_int8(codes, words):
    """int8 entries of codes below 16 by byte permute; words int32 [4]."""
    w0, w1, w2, w3 = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    return tl.inline_asm_elementwise(
        BYTE_ASM, BYTE_CONSTRAINTS, [codes.to(tl.uint8), w0, w1, w2, w3], dtype=tl.int8, is_pure=True, pack=4
    )


@triton.jit
def permute_fp8(codes, words):
    """fp8 entries of codes below 16 by byte permute; words int32 [4]."""
    w0, w1, w2, w3 = tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)
    return tl.inline_asm_elementwise(
        BYTE_ASM, BYTE_CONSTRAINTS, [codes.to(tl.uint8), w0, w1, w2, w3], dtype=tl.float8e4nv, is_pure=True, pack=4
    )


@triton.jit
def permute_halves(codes, words):
    """float16 centroids of codes below 16 by byte permute; words int32 [8], low bytes first."""
    return tl.inline_asm_elementwise(
        HALF_ASM,
        HALF_CONSTRAINTS,
        [
            codes.to(tl.uint8),
            tl.load(words),
            tl.load(words + 1),
            tl.load(words + 2),
            tl.load(words + 3),
            tl.load(words + 4),
            tl.load(words + 5),
            tl.load(words + 6),
            tl.load(words + 7),
        ],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@dataclass(frozen=True)
class Parts:
    """A number as high + low * LOW_UNIT, both of eight bits, in units of its largest magnitude over FULL.

    Attributes:
        dtype: The type of either part.
        full: The largest high part.
        low_unit: What one of the low part is worth: half a unit of the high part is the most it has to say.
    """

    dtype: torch.dtype
    full: float
    low_unit: float


PARTS = {"int8": Parts(torch.int8, 127.0, 1 / 254), "fp8": Parts(torch.float8_e4m3fn, 256.0, 1 / 16)}


def entry_unit(head_dim: int, bits: int, kind: str) -> float:
    """What entries are multiplied with to be centroids of unit variance."""
    return 1.0 if kind == "float16" else float(_unit_variance(head_dim, bits).max() / PARTS[kind].full)


@cache
def entries(head_dim: int, bits: int, kind: str, device: torch.device) -> torch.Tensor:
    """Centroids in units of `entry_unit`: float16 [1, 2^bits], or the two parts [2, 2^bits] of int8 or fp8."""
    centroids = _unit_variance(head_dim, bits) / entry_unit(head_dim, bits, kind)
    if kind == "float16":
        return centroids.to(torch.float16)[None].to(device)
    parts = PARTS[kind]
    high = (centroids.round() if kind == "int8" else centroids).to(parts.dtype)
    rest = (centroids - high.double()) / parts.low_unit
    low = (rest.round() if kind == "int8" else rest).to(parts.dtype)
    return torch.stack([high, low]).to(device)


@cache
def entry_words(head_dim: int, bits: int, kind: str, device: torch.device) -> torch.Tensor:
    """The bytes of sixteen entries, int32 [8]: low and then high bytes of float16, or high and then low part."""
    table = entries(head_dim, bits, kind, torch.device("cpu"))
    sixteen = torch.zeros(len(table), 16, dtype=table.dtype, device=table.device)
    sixteen.view(torch.uint8)[:, : table.shape[1] * table.itemsize] = table.view(torch.uint8)
    planes = sixteen.view(torch.uint8).view(len(table), 16, table.itemsize).transpose(1, 2).contiguous()
    return planes.flatten().view(torch.int32).to(device)


def _unit_variance(head_dim: int, bits: int) -> torch.Tensor:
    return torch.from_numpy(unit_variance_centroids(head_dim, bits))
