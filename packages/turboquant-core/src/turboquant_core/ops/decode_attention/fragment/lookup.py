"""Codes to operands of the tensor cores in registers, eight codes at a time, as inline PTX.

Keys become int8. Up to four bits a byte permute looks four codes up in a table of eight bytes. From five bits on the
grid is uniform, and a code at the top of its byte is the number itself. Either way a centroid is its byte plus an
offset, times a unit: minus (n + 1/2) is the complement of n, so that a sign is an XOR.

Values become float16 whose low byte is a magnitude and whose high byte is the sign alone. These are subnormal numbers,
multiples of 2^-24, which tensor cores multiply at full speed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np

from turboquant_core.codebook import MAX_TABLE_BITS, grid_codebook

SUBNORMAL_STEP = 2.0**-24
SIGN = 0x80


@dataclass(frozen=True)
class Lookup:
    """How the codes of one width become an operand.

    A word of eight codes holds code 2b in the low and code 2b + 1 in the high nibble of byte b; codes of more than four
    bits come as two words, byte b of the first holding code 2b and byte b of the second code 2b + 1.

    Attributes:
        table: int32 constants that the assembly takes after the words.
        asm: Of keys, the words of one token to two words of four int8. Of values, the words of two tokens to eight
            pairs of float16, one of either token.
        constraints: Register constraints of `asm`.
        order: Which of the eight codes each int8, or each pair, is.
        unit: What a number is multiplied with, after `offset`, to be the centroid of a unit vector's coordinate.
        offset: What is added to it before; 0 for values.
    """

    table: tuple[int, ...]
    asm: str
    constraints: str
    order: tuple[int, ...]
    unit: float
    offset: float = 0.0


@cache
def key_lookup(head_dim: int, bits: int) -> Lookup:
    """The look-up of keys of `bits` bits at `head_dim`."""
    book = grid_codebook(head_dim, bits)
    if bits > MAX_TABLE_BITS:
        asm = _Assembly(outputs=2, words=2, copies=4)
        asm.add(f"shl.b32 $0, w0, {8 - bits}", f"shl.b32 $1, w1, {8 - bits}")
        return asm.lookup((0, 2, 4, 6, 1, 3, 5, 7), unit=book.unit * 2.0 ** (bits - 7), offset=2.0 ** (7 - bits))
    magnitudes = [level // 2 for level in book.levels]
    if bits == MAX_TABLE_BITS:
        asm = _Assembly(outputs=2, words=1, copies=4, table=_words(magnitudes))
        asm.add("and.b32 s, w0, 0x77777777", "shl.b32 u, w0, 4")
        # Bytes of the sign of each code, from the top bits of the low and of the high nibbles.
        for output, spread in enumerate(("0xD9C8", "0xFBEA")):
            asm.add("prmt.b32 x, t0, t1, s", f"prmt.b32 y, u, w0, {spread}", f"xor.b32 ${output}, x, y")
            asm.add("shr.u32 s, s, 16")
    else:
        asm = _Assembly(outputs=2, words=1, copies=4, table=_words([*magnitudes, *(~n & 0xFF for n in magnitudes)]))
        last = f"t{2 ** (bits - 2) - 1}"
        asm.add(f"prmt.b32 $0, t0, {last}, w0", "shr.u32 s, w0, 16", f"prmt.b32 $1, t0, {last}, s")
    return asm.lookup(range(8), unit=2 * book.unit, offset=0.5)


@cache
def value_lookup(head_dim: int, bits: int) -> Lookup:
    """The look-up of values of `bits` bits at `head_dim`."""
    book = grid_codebook(head_dim, bits)
    if bits > MAX_TABLE_BITS:
        return _uniform_values(bits, book.unit)
    levels = list(book.levels)
    signs = [0] * len(levels) + [SIGN] * len(levels)
    table = _words(levels) if bits == MAX_TABLE_BITS else (*_words(levels * 2), *_words(signs))
    asm = _Assembly(outputs=8, words=2, copies=2, table=table)
    for half, interleaved in enumerate(("0x5140", "0x7362")):
        # Byte by byte a token, then the other: their nibbles of one place become neighbours.
        asm.add(f"prmt.b32 x, w0, w1, {interleaved}")
        if bits == MAX_TABLE_BITS:
            asm.add("shl.b32 u, x, 4", "and.b32 h, x, 0x80808080", "and.b32 l, u, 0x80808080")
            asm.add("and.b32 s, x, 0x77777777")
            for part, merges in enumerate((("0x5240", "0x5341"), ("0x7260", "0x7361"))):
                asm.add("prmt.b32 y, t0, t1, s", "shr.u32 s, s, 16")
                for place, (merge, sign) in enumerate(zip(merges, "lh", strict=True)):
                    asm.add(f"prmt.b32 ${4 * half + 2 * part + place}, y, {sign}, {merge}")
        else:
            middle = len(table) // 2
            for part in range(2):
                asm.add(f"prmt.b32 y, t0, t{middle - 1}, x", f"prmt.b32 h, t{middle}, t{len(table) - 1}, x")
                asm.add("shr.u32 x, x, 16")
                for place, merge in enumerate(("0x6240", "0x7351")):
                    asm.add(f"prmt.b32 ${4 * half + 2 * part + place}, y, h, {merge}")
    return asm.lookup(range(8), unit=book.unit / SUBNORMAL_STEP)


def _uniform_values(bits: int, unit: float) -> Lookup:
    asm = _Assembly(outputs=8, words=4, copies=2)
    # A magnitude is 2 m + 1 at the top of the seven bits below the sign; for eight bits it takes all eight.
    mask, last = (0x7F, 1) if bits == 8 else (0x80 - (1 << (8 - bits)), 1 << (7 - bits))
    output = 0
    for word in range(2):
        for interleaved in ("0x5140", "0x7362"):
            asm.add(f"prmt.b32 x, w{word}, w{word + 2}, {interleaved}", f"shl.b32 x, x, {8 - bits}")
            asm.add("prmt.b32 y, x, x, 0xBA98", "xor.b32 y, y, x", f"and.b32 y, y, {mask * 0x01010101:#x}")
            if bits == 8:
                asm.add("shl.b32 y, y, 1")
            asm.add(f"or.b32 y, y, {last * 0x01010101:#x}", "and.b32 s, x, 0x80808080")
            for merge in ("0x5140", "0x7362"):
                asm.add(f"prmt.b32 ${output}, y, s, {merge}")
                output += 1
    step = 1 if bits == 8 else last
    return asm.lookup((0, 2, 4, 6, 1, 3, 5, 7), unit=unit / SUBNORMAL_STEP / step)


class _Assembly:
    """PTX text with outputs, then words, then table constants as operands, each operand several times.

    The assembly makes several elements at a time, which lie in one register, and so sees the operands of all of them.
    """

    def __init__(self, outputs: int, words: int, copies: int, table: tuple[int, ...] = ()) -> None:
        operands = [*(f"w{i}" for i in range(words)), *(f"t{i}" for i in range(len(table)))]
        self._table = table
        self._constraints = ",".join(["=r"] * outputs + ["r"] * (copies * len(operands)))
        self._lines = [".reg .b32 s, u, x, y, h, l, " + ", ".join(operands)]
        self.add(*(f"mov.b32 {name}, ${outputs + copies * i}" for i, name in enumerate(operands)))

    def add(self, *lines: str) -> None:
        self._lines += lines

    def lookup(self, order: Iterable[int], unit: float, offset: float = 0.0) -> Lookup:
        text = "{\n" + "".join(f"{line};\n" for line in self._lines) + "}\n"
        return Lookup(self._table, text, self._constraints, tuple(order), unit, offset)


def _words(entries: list[int]) -> tuple[int, ...]:
    """Bytes as int32 words, the last one filled up."""
    padded = np.array(entries + [0] * (-len(entries) % 4), dtype=np.uint8)
    return tuple(padded.view("<i4").tolist())
