"""Codes to operands of the tensor cores in registers, eight codes at a time, as inline PTX.

Keys become int8. Up to four bits a byte permute looks four codes up in a table of eight bytes. From five bits on the
grid is uniform, and a code at the top of its byte is the number itself. Either way a centroid is its byte plus an
offset, times a unit: minus (n + 1/2) is the complement of n, so that a sign is an XOR.

Values become float16 whose low byte is a magnitude and whose high byte is the sign alone. These are subnormal numbers,
multiples of 2^-24, which tensor cores multiply at full speed.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np

from turboquant_core.codebook import MAX_TABLE_BITS, Codebook, grid_codebook

SUBNORMAL_STEP = 2.0**-24
SIGN = 0x80
# Which bytes' top bits fill four bytes, the signs of codes, from those of the low and of the high nibbles.
SIGN_BYTES = ("0xD9C8", "0xFBEA")


@dataclass(frozen=True)
class Lookup:
    """How the codes of one width become an operand.

    A word of eight codes holds code 2b in the low and code 2b + 1 in the high nibble of byte b; codes of more than four
    bits come as two words, byte b of the first holding code 2b and byte b of the second code 2b + 1.

    Attributes:
        table: int32 constants that the assembly takes after the words.
        asm: Of keys, the words of one token to two words of four int8, for each group of channels. Of values, the words
            of two tokens to eight pairs of float16, one of either token.
        constraints: Register constraints of `asm`.
        groups: What the numbers of each group of channels are: of one, or of the halves of split keys.
    """

    table: tuple[int, ...]
    asm: str
    constraints: str
    groups: tuple["Numbers", ...]


@dataclass(frozen=True)
class Numbers:
    """What the numbers are that a word of codes becomes.

    Attributes:
        order: Which of the eight codes each int8, or each pair, is.
        unit: What a number is multiplied with, after `offset`, to be the centroid of a unit vector's coordinate.
        offset: What is added to it before; 0 for values.
    """

    order: tuple[int, ...]
    unit: float
    offset: float = 0.0


# In the order of the words of even codes and of odd ones, or as the codes come.
EVEN_THEN_ODD = (0, 2, 4, 6, 1, 3, 5, 7)
IN_ORDER = tuple(range(8))


@cache
def key_lookup(head_dim: int, bits: int) -> Lookup:
    """The look-up of keys of `bits` bits at `head_dim`."""
    book = grid_codebook(head_dim, bits)
    if bits > MAX_TABLE_BITS:
        asm = _Assembly(outputs=2, words=2, copies=4)
        asm.add(f"shl.b32 $0, w0, {8 - bits}", f"shl.b32 $1, w1, {8 - bits}")
        return asm.lookup(Numbers(EVEN_THEN_ODD, unit=book.unit * 2.0 ** (bits - 7), offset=2.0 ** (7 - bits)))
    asm = _Assembly(outputs=2, words=1, copies=4, table=_key_table(book))
    asm.look_up_keys(bits, "w0", first_output=0)
    return asm.lookup(_table_numbers(book))


@cache
def split_key_lookup(head_dim: int, bits: int) -> Lookup:
    """The look-up of the halves of split keys.

    A word of eight codes holds 2 * bits bits of each: all at 2 bits; at 3 the first half's, with a second word of the
    second half's; at 4 bits byte b of the first word is code 2b, and byte b of the second code 2b + 1.
    """
    first, second = (grid_codebook(head_dim // 2, width) for width in (bits + 1, bits - 1))
    if bits == 4:
        asm = _Assembly(outputs=4, words=2, copies=4, table=_key_table(second))
        # Two's complement less its least number is a number without a sign.
        asm.add(*(f"lop3.b32 ${i}, w{i}, 0x1F1F1F1F, 0x10101010, 0x6A" for i in range(2)))
        asm.add("and.b32 x, w0, 0xE0E0E0E0", "shr.u32 x, x, 5", "shr.u32 y, w1, 1")
        asm.add("lop3.b32 x, y, 0x70707070, x, 0xEA")
        asm.look_up_keys(3, "x", first_output=2)
        return asm.lookup(Numbers(EVEN_THEN_ODD, unit=2 * first.unit, offset=-15.5), _table_numbers(second))
    if bits == 3:
        asm = _Assembly(outputs=4, words=2, copies=4, table=(*_key_table(first), *_key_table(second)))
        asm.look_up_keys(4, "w0", first_output=0)
        asm.look_up_keys(2, "w1", first_output=2, first_word=len(_key_table(first)))
        return asm.lookup(_table_numbers(first), _table_numbers(second))
    asm = _Assembly(outputs=4, words=1, copies=4, table=_key_table(first))
    asm.add("and.b32 x, w0, 0x77777777")
    asm.look_up_keys(3, "x", first_output=0)
    asm.add("shl.b32 u, w0, 4", *(f"prmt.b32 ${2 + i}, u, w0, {spread}" for i, spread in enumerate(SIGN_BYTES)))
    return asm.lookup(_table_numbers(first), _table_numbers(second))


def _key_table(book: Codebook) -> tuple[int, ...]:
    magnitudes = [level // 2 for level in book.levels]
    if book.bits == MAX_TABLE_BITS:
        return _words(magnitudes)
    return _words([*magnitudes, *(~n & 0xFF for n in magnitudes)])


def _table_numbers(book: Codebook) -> Numbers:
    return Numbers(IN_ORDER, unit=2 * book.unit, offset=0.5)


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
    return asm.lookup(Numbers(IN_ORDER, unit=book.unit / SUBNORMAL_STEP))


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
    return asm.lookup(Numbers(EVEN_THEN_ODD, unit=unit / SUBNORMAL_STEP / step))


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

    def look_up_keys(self, bits: int, word: str, *, first_output: int, first_word: int = 0) -> None:
        """Look the codes of a word up, of up to four bits, in words of the table from `first_word` on."""
        names = [f"t{first_word + i}" for i in range(2)]
        if bits == MAX_TABLE_BITS:
            self.add(f"and.b32 s, {word}, 0x77777777", f"shl.b32 u, {word}, 4")
            for i, spread in enumerate(SIGN_BYTES):
                self.add(f"prmt.b32 x, {names[0]}, {names[1]}, s", f"prmt.b32 y, u, {word}, {spread}")
                self.add(f"xor.b32 ${first_output + i}, x, y", "shr.u32 s, s, 16")
        else:
            last = names[2 ** (bits - 2) - 1]
            self.add(f"prmt.b32 ${first_output}, {names[0]}, {last}, {word}", f"shr.u32 s, {word}, 16")
            self.add(f"prmt.b32 ${first_output + 1}, {names[0]}, {last}, s")

    def lookup(self, *groups: Numbers) -> Lookup:
        text = "{\n" + "".join(f"{line};\n" for line in self._lines) + "}\n"
        return Lookup(self._table, text, self._constraints, groups)


def _words(entries: list[int]) -> tuple[int, ...]:
    """Bytes as int32 words, the last one filled up."""
    padded = np.array(entries + [0] * (-len(entries) % 4), dtype=np.uint8)
    return tuple(padded.view("<i4").tolist())
