"""The best scalar quantiser there is (paper, Eq. 4), which codebooks are measured against."""

from functools import cache

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_banded
from scipy.special import ndtri

from turboquant_core.codebook import SphereCoordinate, expected_mse


@cache
def lloyd_max_centroids(head_dim: int, bits: int) -> npt.NDArray[np.float64]:
    """The positive half of the Lloyd-Max centroids of one coordinate, float64 [2**(bits - 1)], ascending.

    Newton's method on the centroid condition E[X | cell] - c = 0. The density is log-concave, so the condition has one
    solution. Lloyd's own iteration needs thousands of steps at 8 bits; the Jacobian here is tridiagonal, and about ten
    steps reach the last digit.
    """
    density, count = SphereCoordinate(head_dim), 2 ** (bits - 1)
    # The optimal point density is f^(1/3), for a Gaussian one of three times the variance.
    start = ndtri(0.5 + 0.5 * (np.arange(count) + 0.5) / count)
    centroids = np.asarray(start * np.sqrt(3.0 / head_dim), dtype=np.float64)
    centroids *= min(1.0, 0.999 / centroids[-1])
    for _ in range(60):
        inner = (centroids[1:] + centroids[:-1]) / 2
        probability, moment = density.cells(inner)
        mean = moment / probability
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
    raise ArithmeticError(f"no Lloyd-Max centroids after 60 steps at head_dim {head_dim} and {bits} bits")


@cache
def lloyd_max_mse(head_dim: int, bits: int) -> float:
    """The least E‖x - x̂‖² of a scalar quantiser for ‖x‖ = 1."""
    return expected_mse(SphereCoordinate(head_dim), lloyd_max_centroids(head_dim, bits))
