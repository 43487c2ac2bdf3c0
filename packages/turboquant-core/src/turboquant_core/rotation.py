"""The fixed random rotation Π that makes every coordinate of a unit vector look alike (paper, Algorithm 1, line 2)."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from turboquant_core._checks import check_head_dim
from turboquant_core._seeded import random_normal, random_signs

# After one round of signs and Hadamard the coordinates of a one-hot vector have a single size; every further round adds
# sizes. The cells of 8 bits at head_dim 64 are fine enough to tell three rounds (23 % above the Lloyd-Max error on
# 3-sparse vectors), four (19 %) and five (5 %) from a uniform rotation; six are within 2 %. From head_dim 128 on four
# are within 3 %, and their matrix is one of integers of at most 8 bits at 128: bfloat16 holds it. An even number makes
# the normaliser a power of two, so that the matrix is exact.
MIN_HEAD_DIM_OF_FOUR_ROUNDS = 128


@dataclass(frozen=True)
class Rotation:
    """One orthogonal matrix Π per head_dim, shared by keys, values, heads and layers.

    A power of two uses signs and Hadamard transforms, H D₄ … H D₁ or, below head_dim 128, H D₆ … H D₁, computed in
    integers and so the same to the last bit on every machine. Other sizes use the orthogonal factor of a Gaussian
    matrix, uniform over rotations. Both are applied as one [d, d] product.

    Args:
        head_dim: Dimension d, a multiple of 8 from 8 to 512.
        seed: Picks another matrix of the same family. 0 is the format's own; others serve to average over rotations.
    """

    head_dim: int
    seed: int = 0

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)

    @property
    def matrix(self) -> torch.Tensor:
        """Π as float64 [head_dim, head_dim] on the CPU. Shared and cached: do not write to it."""
        return _matrix(self.head_dim, self.seed, torch.device("cpu"), torch.float64)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Πx along the last dimension of x [..., head_dim], in float32 (float64 for float64 input)."""
        x = _widen(x)
        return x @ _matrix(self.head_dim, self.seed, x.device, x.dtype).T

    def unrotate(self, y: torch.Tensor) -> torch.Tensor:
        """Πᵀy along the last dimension of y [..., head_dim], in float32 (float64 for float64 input)."""
        y = _widen(y)
        return y @ _matrix(self.head_dim, self.seed, y.device, y.dtype)


def _widen(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


@cache
def _matrix(head_dim: int, seed: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if (device.type, dtype) == ("cpu", torch.float64):
        power_of_two = head_dim & (head_dim - 1) == 0
        build = _signed_hadamard if power_of_two else _haar
        return torch.from_numpy(build(head_dim, seed))
    return _matrix(head_dim, seed, torch.device("cpu"), torch.float64).to(device, dtype)


def _signed_hadamard(head_dim: int, seed: int) -> npt.NDArray[np.float64]:
    hadamard = np.ones((1, 1))
    while len(hadamard) < head_dim:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rotation = np.eye(head_dim)
    rounds = 4 if head_dim >= MIN_HEAD_DIM_OF_FOUR_ROUNDS else 6
    for i in range(rounds):
        signs = random_signs(f"rotation/hadamard/{head_dim}/{seed}/{i}", head_dim)
        rotation = hadamard @ (signs[:, None] * rotation)
    return np.asarray(rotation / head_dim ** (rounds // 2))


def _haar(head_dim: int, seed: int) -> npt.NDArray[np.float64]:
    gaussian = random_normal(f"rotation/qr/{head_dim}/{seed}", (head_dim, head_dim))
    q, r = np.linalg.qr(gaussian)
    # The factorisation leaves column signs to the library; a positive diagonal of R fixes them.
    return np.ascontiguousarray(q * np.sign(np.diag(r)))
