"""Lloyd-Max codebooks for one coordinate of a random point on the unit sphere (paper, Section 3.1, Eq. 4).

After a random rotation every coordinate of a unit vector in R^d has the density
f(x) ∝ (1 - x²)^((d-3)/2) on [-1, 1] (paper, Lemma 1), whatever the vector was. The best scalar quantiser for a known
density is a fixed table, so nothing is learnt from data.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import solve_banded
from scipy.special import betainc, gammaln, ndtri

from turboquant_core._checks import MAX_HEAD_DIM, MIN_HEAD_DIM, check_bits

_Float64Array = npt.NDArray[np.float64]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)


@dataclass(frozen=True, eq=False)
class Codebook:
    """The Lloyd-Max quantiser of one coordinate.

    Attributes:
        head_dim: Dimension d of the sphere.
        bits: Bits per coordinate.
        centroids: float64 [2**bits], ascending and exactly symmetric about zero. Every value is a float32, so that
            float32 code reads the same table.
        boundaries: float64 [2**bits - 1], the midpoints of neighbouring centroids.
        mse: Expected ‖x - x̂‖² for ‖x‖ = 1, which is d times the expected squared error of one coordinate.
    """

    head_dim: int
    bits: int
    centroids: torch.Tensor
    boundaries: torch.Tensor
    mse: float


@cache
def lloyd_max_codebook(head_dim: int, bits: int) -> Codebook:
    """The optimal fixed codebook for unit vectors of dimension `head_dim` (paper, Eq. 4).

    Computed once per process in float64 and rounded to float32, which absorbs the last-digit differences between
    maths libraries: the table is the same on every machine.

    Args:
        head_dim: Dimension d, from 8 to 512.
        bits: Bits per coordinate, from 1 to 8.

    Raises:
        ValueError: If either is out of range.
    """
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}; codebooks exist from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}")
    check_bits(bits)
    density = _SphereCoordinate(head_dim)
    positive = _solve_positive_half(density, 2 ** (bits - 1)).astype(np.float32).astype(np.float64)
    centroids = np.concatenate([-positive[::-1], positive])
    return Codebook(
        head_dim=head_dim,
        bits=bits,
        centroids=torch.from_numpy(centroids),
        boundaries=torch.from_numpy((centroids[1:] + centroids[:-1]) / 2),
        mse=_expected_mse(density, positive),
    )


class _SphereCoordinate:
    """The density of a coordinate on the unit sphere in R^d, and its integrals over cells of [0, 1]."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._log_norm = gammaln(head_dim / 2) - gammaln((head_dim - 1) / 2) - 0.5 * np.log(np.pi)

    def density(self, x: _Float64Array) -> _Float64Array:
        return np.asarray(np.exp(self._log_norm + (self.head_dim - 3) / 2 * np.log1p(-(x**2))))

    def cells(self, inner: _Float64Array) -> tuple[_Float64Array, _Float64Array]:
        """Probability and conditional mean of the cells [0, b₁], [b₁, b₂], …, [b, 1].

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
        probability = mass.sum(1)
        return (
            np.concatenate([probability, tail]),
            np.concatenate([(mass * x).sum(1) / probability, tail_moment / tail]),
        )


def _solve_positive_half(density: _SphereCoordinate, count: int) -> _Float64Array:
    """Newton's method on the centroid condition E[X | cell] - c = 0, over the positive centroids.

    The density is log-concave, so the condition has one solution. Lloyd's own iteration needs thousands of steps at
    8 bits; the Jacobian here is tridiagonal, and about ten steps reach the last digit.
    """
    # The optimal point density is f^(1/3), for a Gaussian one of three times the variance.
    start = ndtri(0.5 + 0.5 * (np.arange(count) + 0.5) / count)
    centroids = np.asarray(start * np.sqrt(3.0 / density.head_dim), dtype=np.float64)
    centroids *= min(1.0, 0.999 / centroids[-1])
    for _ in range(60):
        inner = (centroids[1:] + centroids[:-1]) / 2
        probability, mean = density.cells(inner)
        # A boundary moves by half of what either neighbour moves; d mean / d boundary = f (boundary - mean) / P.
        weight = 0.5 * density.density(inner)
        from_upper = weight * (inner - mean[:-1]) / probability[:-1]
        from_lower = weight * (mean[1:] - inner) / probability[1:]
        banded = np.zeros((3, count))
        banded[0, 1:] = from_upper
        banded[1] = -1.0
        banded[1, :-1] += from_upper
        banded[1, 1:] += from_lower
        banded[2, :-1] = from_lower
        step = solve_banded((1, 1), banded, centroids - mean)
        centroids = centroids + step
        if np.max(np.abs(step)) < 1e-12:
            return centroids
    raise ArithmeticError(
        f"no Lloyd-Max codebook after 60 steps at head_dim {density.head_dim} with {2 * count} centroids"
    )


def _expected_mse(density: _SphereCoordinate, centroids: _Float64Array) -> float:
    """E‖x - x̂‖² = 1 - 2d Σ c (2 E[X | cell] - c) P(cell) over the positive half."""
    probability, mean = density.cells((centroids[1:] + centroids[:-1]) / 2)
    explained = 2.0 * np.sum(probability * centroids * (2.0 * mean - centroids))
    return float(1.0 - density.head_dim * explained)
