"""Codes to float16 centroids in registers, eight codes at a time, as inline PTX.

Two ways, both without memory:

- `prmt` (2 to 4 bits): a byte permute looks four codes up in a table of eight bytes. One table holds the high and one
  the low bytes of the float16 centroids. Sixteen centroids are eight magnitudes and a sign.
- polynomial (5, 6 and 8 bits): Lloyd-Max centroids are a smooth odd function of the code, but for a few at either end
  that lie far out. A polynomial in float16 pairs, whose highest term begins only there, runs on the FMA units.

Centroids are those of a coordinate of unit variance, sqrt(head_dim) times those of a unit vector.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt

from turboquant_core.ops.decode_attention.centroids import MAX_PERMUTED_BITS, unit_variance_centroids
from turboquant_core.ops.decode_attention.fragment.widths import WIDTHS

# What a code counts at least when a polynomial is fitted: one of the outermost occurs once in many vectors, but in a
# short row its error shows.
LEAST_WEIGHT = 2e-4


@dataclass(frozen=True)
class Lookup:
    """How the codes of one width become centroids.

    A word of eight codes holds code 2b in the low and code 2b + 1 in the high nibble of byte b; codes of more than four
    bits come as two words, byte b of the first holding code 2b and byte b of the second code 2b + 1.

    Attributes:
        words: int32 words of eight codes: 1, or 2 above four bits.
        table: int32 constants that the assembly takes after the words.
        key_asm: Words of one token to four pairs of float16 of that token.
        key_order: Which of the eight codes each of those eight float16 is.
        value_asm: Words of two tokens to eight pairs of float16, one of either token.
        value_order: Which of the eight codes each of those pairs is.
    """

    words: int
    table: tuple[int, ...]
    key_asm: str
    key_order: tuple[int, ...]
    value_asm: str
    value_order: tuple[int, ...]

    @property
    def key_constraints(self) -> str:
        """Register constraints of `key_asm`."""
        return _constraints(4, self.words + len(self.table))

    @property
    def value_constraints(self) -> str:
        """Register constraints of `value_asm`."""
        return _constraints(8, 2 * self.words + len(self.table))


@cache
def lookup(head_dim: int, bits: int) -> Lookup:
    """The look-up of codes of `bits` bits at `head_dim`.

    Raises:
        ValueError: If there is none of that width.
    """
    if bits not in WIDTHS:
        raise ValueError(f"bits is {bits}, and this looks up {', '.join(map(str, WIDTHS))}")
    return _prmt_lookup(head_dim, bits) if bits <= MAX_PERMUTED_BITS else _polynomial_lookup(head_dim, bits)


def _prmt_lookup(head_dim: int, bits: int) -> Lookup:
    centroids = unit_variance_centroids(head_dim, bits)
    entries = -centroids[8:] if bits == MAX_PERMUTED_BITS else centroids
    halves = entries.astype(np.float16).view(np.uint16)
    low, high = (_packed_bytes(plane) for plane in halves.view(np.uint8).reshape(-1, 2).T)
    table = (*low, *high)
    names = [f"t{i}" for i in range(len(table))]
    low_names, high_names = names[: len(low)], names[len(low) :]

    key = _Assembly(4, 1, names)
    key_order = key.prmt_codes("w0", bits, low_names, high_names, 0, range(8))

    value = _Assembly(8, 2, names)
    # Byte b of the mixed words: a nibble of token 0, then the same nibble of token 1.
    value.add("and.b32 y, w0, 0x0F0F0F0F", "shl.b32 z, w1, 4", "and.b32 z, z, 0xF0F0F0F0", "or.b32 y, y, z")
    even = value.prmt_codes("y", bits, low_names, high_names, 0, [0, 0, 2, 2, 4, 4, 6, 6])
    value.add("shr.u32 y, w0, 4", "and.b32 y, y, 0x0F0F0F0F", "and.b32 z, w1, 0xF0F0F0F0", "or.b32 y, y, z")
    odd = value.prmt_codes("y", bits, low_names, high_names, 4, [1, 1, 3, 3, 5, 5, 7, 7])
    return Lookup(1, table, key.text(), key_order, value.text(), (*even[::2], *odd[::2]))


def _polynomial_lookup(head_dim: int, bits: int) -> Lookup:
    coefficients = odd_polynomial(head_dim, bits)
    # From registers, mask and exponent are one instruction together; two immediates would be two.
    table = (*_byte_pair_constants(bits), *(_pair(c) for c in coefficients))
    names = [f"t{i}" for i in range(len(table))]

    key = _Assembly(4, 2, names)
    key_order: list[int] = []
    for word in range(2):
        for parity in range(2):
            key.byte_pair(f"w{word}", bits, parity)
            key.polynomial(bits, names[2:], 2 * word + parity)
            key_order += [2 * parity + word, 4 + 2 * parity + word]

    value = _Assembly(8, 4, names)
    value_order: list[int] = []
    for word in range(2):
        for half, selector in enumerate(("0x5410", "0x7632")):
            # Two bytes of token 0, then the same two of token 1.
            value.add(f"prmt.b32 m, w{word}, w{2 + word}, {selector}")
            for parity in range(2):
                value.byte_pair("m", bits, parity)
                value.polynomial(bits, names[2:], len(value_order))
                value_order.append(2 * (2 * half + parity) + word)
    return Lookup(2, table, key.text(), tuple(key_order), value.text(), tuple(value_order))


class _Assembly:
    """PTX text with float16 pairs as outputs, then words, then table constants as operands, each operand twice.

    The assembly makes two elements at a time, the two float16 of a pair, and so sees the operands of both.
    """

    def __init__(self, outputs: int, words: int, table: list[str]) -> None:
        operands = [f"w{i}" for i in range(words)] + table
        self._lines = [".reg .b32 y, z, m, s, h0, h1, l0, l1, r, u, q, " + ", ".join(operands)]
        self._lines += [f"mov.b32 {name}, ${outputs + 2 * i}" for i, name in enumerate(operands)]

    def add(self, *lines: str) -> None:
        self._lines += lines

    def text(self) -> str:
        return "{\n" + "".join(f"{line};\n" for line in self._lines) + "}\n"

    def output_pair(self, index: int) -> None:
        self.add(f"mov.b32 ${index}, r")

    def prmt_codes(
        self, word: str, bits: int, low: list[str], high: list[str], first_pair: int, codes: "list[int] | range"
    ) -> tuple[int, ...]:
        """Eight nibbles of `word` to four pairs of outputs; returns `codes` in output order."""
        selector = word
        if bits == MAX_PERMUTED_BITS:
            # Codes ascend, so below the middle the magnitude's index is the complement of the low three bits: t - t / 8
            # turns a nibble's clear top bit into those three, on the multipliers, which have time. The selector's own
            # top bit would replicate a sign instead of selecting a byte and must be clear.
            self.add(f"not.b32 m, {word}", "and.b32 m, m, 0x88888888", "mul.hi.u32 s, m, 0xE0000000")
            self.add(f"xor.b32 s, s, {word}", "and.b32 s, s, 0x77777777")
            self.add(f"shl.b32 m, {word}, 4")
            selector = "s"
        for part in range(2):
            if part:
                self.add(f"shr.u32 s, {selector}, 16")
                selector = "s"
            for plane, table in (("h", high), ("l", low)):
                self.add(f"prmt.b32 {plane}{part}, {table[0]}, {table[-1]}, {selector}")
            if bits == MAX_PERMUTED_BITS:
                spread = ("0x5140", "0x7362")[part]
                # The top bits of four nibbles, each at the top of its byte; the table holds negative magnitudes.
                self.add(f"prmt.b32 r, m, {word}, {spread}", "and.b32 r, r, 0x80808080", f"xor.b32 h{part}, h{part}, r")
            for half, merge in enumerate(("0x5140", "0x7362")):
                self.add(f"prmt.b32 r, l{part}, h{part}, {merge}")
                self.output_pair(first_pair + 2 * part + half)
        return tuple(codes)

    def byte_pair(self, word: str, bits: int, parity: int) -> None:
        """Make y the pair of float16 1024 + f of bytes `parity` and `parity` + 2 of `word`, both codes k.

        f is k in the top bits of a byte, or 2k + 1 for eight bits: either way (f - middle) times a power of two is
        (2k + 1 - 2^bits) / 2^bits, and a float16. 0x6400 is 1024, whose last place is one: an OR converts.
        """
        shift = (1 if bits == 8 else 8 - bits) - 8 * parity
        source = word
        if shift:
            self.add(f"sh{'l.b32' if shift > 0 else 'r.u32'} y, {word}, {abs(shift)}")
            source = "y"
        self.add(f"and.b32 y, {source}, t0", "or.b32 y, y, t1")

    def polynomial(self, bits: int, coefficients: list[str], index: int) -> None:
        """The pair y of `byte_pair` to output `index`."""
        scale, offset = (1 / 256, -5.0) if bits == 8 else (1 / 128, -8 - (2**bits - 1) / 2**bits)
        self.add(f"mov.b32 q, {_pair(scale):#x}", f"mov.b32 r, {_pair(offset):#x}", "fma.rn.f16x2 u, y, q, r")
        *lower, start, slope = coefficients
        self.add("mul.rn.f16x2 q, u, u", f"mov.b32 r, {slope}", f"fma.rn.sat.f16x2 r, r, q, {start}")
        self.add(*(f"fma.rn.f16x2 r, r, q, {name}" for name in reversed(lower)))
        self.add("mul.rn.f16x2 r, r, u")
        self.output_pair(index)


def _byte_pair_constants(bits: int) -> tuple[int, int]:
    """Mask and exponent of `_Assembly.byte_pair`."""
    if bits == 8:
        return 0x01FE01FE, 0x64016401
    return (0xFF << (8 - bits) & 0xFF) * 0x10001, 0x64006400


def odd_polynomial(head_dim: int, bits: int) -> tuple[float, ...]:
    """float16 coefficients c that give the centroid of code k at u = (2k + 1 - 2^bits) / 2^bits.

    With n + 2 of them it is c[0] u + c[1] u³ + … + s u^(2n + 1), where s = c[n + 1] u² + c[n], held between 0 and 1, is
    zero but for the outer codes. Least squares, weighted by how often a code occurs; each coefficient is rounded to
    float16 before the lower ones are fitted.
    """
    centroids = unit_variance_centroids(head_dim, bits)
    positive = centroids[len(centroids) // 2 :]
    u = (2 * np.arange(len(positive)) + 1) / len(centroids)
    probability = np.exp(-(positive**2) / 2) * np.gradient(positive)
    weight = np.sqrt(np.maximum(probability / probability.sum(), LEAST_WEIGHT))
    lower_terms = WIDTHS[bits].coefficients - 2
    fits = [_fit_odd(u, positive, weight, lower_terms, start) for start in (u[1:] ** 2 + u[:-1] ** 2) / 2]
    return min(fits, key=lambda fit: float(np.sum((weight * (evaluate_odd(fit, u) - positive)) ** 2)))


def evaluate_odd(coefficients: tuple[float, ...], u: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The polynomial as the assembly computes it, rounding to float16 at every step."""
    *lower, start, slope = coefficients
    square = _half(u * u)
    result = np.clip(_half(slope * square + start), 0, 1)
    for coefficient in reversed(lower):
        result = _half(result * square + coefficient)
    return _half(result * u)


def _fit_odd(
    u: npt.NDArray[np.float64],
    target: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    lower_terms: int,
    start: float,
) -> tuple[float, ...]:
    """Coefficients of a polynomial whose highest term begins at u² = `start`."""
    square, powers = u * u, [u ** (2 * i + 1) for i in range(lower_terms + 1)]
    outer = np.maximum(square - start, 0) * powers[-1]
    slope = float(np.float16(_least_squares([*powers[:-1], outer], target, weight)[-1]))
    fixed = [slope, float(np.float16(-slope * start))]
    rest = target - np.clip(fixed[0] * square + fixed[1], 0, 1) * powers[-1]
    for i in range(lower_terms - 1, -1, -1):
        fixed.append(float(np.float16(_least_squares(powers[: i + 1], rest, weight)[-1])))
        rest = rest - fixed[-1] * powers[i]
    return tuple(reversed(fixed))


def _least_squares(
    terms: list[npt.NDArray[np.float64]], target: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    solution = np.linalg.lstsq(np.stack(terms, axis=1) * weight[:, None], target * weight, rcond=None)[0]
    return np.asarray(solution, dtype=np.float64)


def _constraints(outputs: int, operands: int) -> str:
    return ",".join(["=r"] * outputs + ["r"] * (2 * operands))


def _half(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(x, dtype=np.float16).astype(np.float64)


def _pair(value: float) -> int:
    """The same float16 in both halves of an int32."""
    half = int(np.float16(value).view(np.uint16))
    return _signed(half << 16 | half)


def _packed_bytes(values: npt.NDArray[np.uint8]) -> list[int]:
    return [_signed(int(word)) for word in np.ascontiguousarray(values).view("<u4")]


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
