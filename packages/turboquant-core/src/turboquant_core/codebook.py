"""Codebooks for one coordinate of a random point on the unit sphere, and how their centroids are numbered.

After a random rotation every coordinate of a unit vector in R^d has the density
f(x) ∝ (1 - x²)^((d-3)/2) on [-1, 1] (paper, Lemma 1), whatever the vector was. The best scalar quantiser for a known
density is a fixed table, so nothing is learnt from data.

Centroids are odd integers times a unit: what integer arithmetic multiplies, exactly. Up to four bits the integers are
Lloyd-Max centroids (paper, Eq. 4) but for rounding. From five bits on they are all odd ones, and a code needs no table.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import brentq
from scipy.special import betainc, gammaln

from turboquant_core._checks import MAX_HEAD_DIM, MIN_HEAD_DIM, check_bits
from turboquant_core.kept import kept

MAX_TABLE_BITS = 4
"""Up to here a code is a sign and the index of a level; above, an integer that needs no table."""

# Lloyd-Max centroids at head_dim 128, in the unit that loses least by rounding to odd integers of a byte.
_TABLE_LEVELS = {1: (1,), 2: (67, 223), 3: (27, 83, 147, 235), 4: (11, 33, 55, 79, 105, 135, 173, 227)}
# With a level's eight, the 24 of a float32.
_UNIT_BITS = 16

_Float64Array = npt.NDArray[np.float64]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


@dataclass(frozen=True, eq=False)
class Codebook:
    """The quantiser of one coordinate.

    Attributes:
        head_dim: Dimension d of the sphere.
        bits: Bits per coordinate.
        levels: The positive centroids in units of `unit`, [2**(bits - 1)] odd integers below 256, ascending.
        unit: A float32 of 16 significant bits, so that products with levels are exact.
        centroids: float64 [2**bits], ascending and exactly symmetric about zero. Every value is a float32, so that
            float32 code reads the same table.
        boundaries: float64 [2**bits - 1], the midpoints of neighbouring centroids; float32 values too.
        mse: Expected ‖x - x̂‖² for ‖x‖ = 1, which is d times the expected squared error of one coordinate.
    """

    head_dim: int
    bits: int
    levels: tuple[int, ...]
    unit: float
    centroids: torch.Tensor
    boundaries: torch.Tensor
    mse: float

    @property
    def centroids_by_code(self) -> torch.Tensor:
        """float64 [2**bits], what each code means."""
        return self.centroids[ascending_codes(self.bits).argsort()]


@kept
def grid_codebook(head_dim: int, bits: int) -> Codebook:
    """The fixed codebook for unit vectors of dimension `head_dim`.

    Its unit is the one of least mean square error. Computed once per process in float64 and rounded, which absorbs the
    last-digit differences between maths libraries: the table is the same on every machine.

    Args:
        head_dim: Dimension d, from 8 to 512.
        bits: Bits per coordinate, from 1 to 8.

    Raises:
        ValueError: If either is out of range.
    """
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}; codebooks exist from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}")
    levels = _TABLE_LEVELS.get(check_bits(bits), tuple(range(1, 2**bits, 2)))
    density = SphereCoordinate(head_dim)
    unit = _best_unit(density, np.array(levels, dtype=np.float64))
    positive = unit * np.array(levels, dtype=np.float64)
    centroids = np.concatenate([-positive[::-1], positive])
    return Codebook(
        head_dim=head_dim,
        bits=bits,
        levels=levels,
        unit=unit,
        centroids=torch.from_numpy(centroids),
        boundaries=torch.from_numpy((centroids[1:] + centroids[:-1]) / 2),
        mse=expected_mse(density, positive),
    )


def ascending_codes(bits: int) -> torch.Tensor:
    """The codes of centroids in ascending order, int64 [2**bits].

    Up to `MAX_TABLE_BITS` a code is the index of the centroid's magnitude, and its top bit is set below zero. Above, it
    is q in two's complement, -2**(bits - 1) <= q < 2**(bits - 1), for the centroid (2 q + 1) * unit.
    """
    index, half = torch.arange(2**bits, device="cpu"), 2 ** (bits - 1)
    turned = (index < half) & (bits <= MAX_TABLE_BITS)
    codes: torch.Tensor = index ^ torch.where(turned, 2 * half - 1, half)
    return codes


class SphereCoordinate:
    """The density of a coordinate on the unit sphere in R^d, and its integrals over cells of [0, 1]."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._log_norm = gammaln(head_dim / 2) - gammaln((head_dim - 1) / 2) - 0.5 * np.log(np.pi)

    def density(self, x: _Float64Array) -> _Float64Array:
        """f(x) for |x| < 1."""
        return np.asarray(np.exp(self._log_norm + (self.head_dim - 3) / 2 * np.log1p(-(x**2))))

    def cells(self, inner: _Float64Array) -> tuple[_Float64Array, _Float64Array]:
        """Probability and first moment of the cells [0, b₁], [b₁, b₂], …, [b, 1].

        Differences of distribution functions would lose the digits that 8-bit cells are made of, so every cell but the
        last is integrated by Gauss-Legendre; the last has closed forms.
        """
        edges = np.concatenate([[0.0], inner])
        half = np.diff(edges)[:, None] / 2
        x = edges[:-1, None] + half * (1 + _NODES)
        mass = half * _WEIGHTS * self.density(x)
        last = edges[-1:]
        tail = 0.5 * betainc((self.head_dim - 1) / 2, 0.5, 1 - last**2)
        tail_moment = self.density(last) * (1 - last**2) / (self.head_dim - 1)
        return np.concatenate([mass.sum(1), tail]), np.concatenate([(mass * x).sum(1), tail_moment])


def expected_mse(density: SphereCoordinate, positive: _Float64Array) -> float:
    """E‖x - x̂‖² = 1 - 2d Σ c (2 E[X; cell] - c P(cell)) over the positive centroids c."""
    probability, moment = density.cells((positive[1:] + positive[:-1]) / 2)
    return float(1.0 - 2.0 * density.head_dim * np.sum(positive * (2.0 * moment - positive * probability)))


def _best_unit(density: SphereCoordinate, levels: _Float64Array) -> float:
    """The unit at which the derivative of the error is zero; boundaries, midway, add nothing to it."""
    inner = (levels[1:] + levels[:-1]) / 2

    def slope(unit: float) -> float:
        probability, moment = density.cells(unit * inner)
        return float(np.sum(levels * (moment - unit * levels * probability)))

    # Of coordinates up to 1 none needs a centroid beyond.
    largest = 1.0 / levels[-1]
    mantissa, exponent = np.frexp(brentq(slope, largest / 1000, largest, xtol=1e-15, rtol=1e-14))
    return float(np.ldexp(np.rint(np.ldexp(mantissa, _UNIT_BITS)), exponent - _UNIT_BITS))
