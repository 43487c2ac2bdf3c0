"""The fixed random rotation Π that makes every coordinate of a unit vector look alike (paper, Algorithm 1, line 2)."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from turboquant_core._checks import MAX_HEAD_DIM, MIN_HEAD_DIM, check_head_dim
from turboquant_core._seeded import random_normal, random_signs
from turboquant_core.kept import kept

# After one round of signs and Hadamard the coordinates of a one-hot vector have a single size; every further round adds
# sizes. The fine cells of 8 bits need six rounds at head_dim 64 and four from 128 on, averaged over seeds; the
# figures are in docs/theory.md. An even number makes the normaliser a power of two, so that the matrix is exact.
MIN_HEAD_DIM_OF_FOUR_ROUNDS = 128

# Head_dim to seed. A seed can be unlucky: 0 errs 59 % above Lloyd-Max on one-hot vectors at head_dim 64 and 8 bits, and
# 263 % at 96. Of the first 256 of a head_dim (32 above 128) these have the least error on the worst of one-hot, two-hot
# and equal-magnitude vectors at the worst width: at most 5 % but at head_dim 8, whose coordinates take few sizes. Of
# powers of two only those counted whose entries have 8 bits up to head_dim 128, which bfloat16 holds, or 11 above,
# which float16 holds. scripts/choose_rotation_seeds.py made the choice.
FORMAT_SEEDS = dict(
    zip(
        range(MIN_HEAD_DIM, MAX_HEAD_DIM + 1, 8),
        (
            189, 196, 219, 178, 19, 74, 27, 68, 213, 182, 5, 22, 194, 67, 185, 187,
            10, 27, 13, 15, 0, 11, 30, 15, 0, 25, 20, 3, 28, 4, 22, 19,
            13, 6, 11, 12, 16, 17, 10, 31, 0, 15, 28, 25, 13, 1, 9, 20,
            14, 26, 18, 14, 21, 7, 14, 31, 24, 1, 15, 8, 25, 17, 31, 18,
        ),
        strict=True,
    )
)  # fmt: skip


@dataclass(frozen=True)
class Rotation:
    """One orthogonal matrix Π per head_dim, shared by keys, values, heads and layers.

    A power of two uses signs and Hadamard transforms, H D₄ … H D₁ or, below head_dim 128, H D₆ … H D₁, computed in
    integers and so the same to the last bit on every machine. Other sizes use the orthogonal factor of a Gaussian
    matrix, uniform over rotations. Both are applied as one [d, d] product.

    Args:
        head_dim: Dimension d, a multiple of 8 from 8 to 512.
        seed: Picks a matrix of the family, to average over rotations; None is the format's own.
    """

    head_dim: int
    seed: int | None = None

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)

    @property
    def matrix(self) -> torch.Tensor:
        """Π as float64 [head_dim, head_dim] on the CPU. Shared and cached: do not write to it."""
        return _matrix(self.head_dim, self.seed, torch.device("cpu"), torch.float64)

    @property
    def signs(self) -> torch.Tensor:
        """D₁, D₂, … of a power of two, float64 [rounds, head_dim] of 1 and -1: Π is … H D₂ H D₁ over its size.

        Raises:
            ValueError: If head_dim is another size, whose matrix has no such factors.
        """
        if not _is_power_of_two(self.head_dim):
            raise ValueError(f"head_dim is {self.head_dim}, and only the rotations of powers of two are made of signs")
        return torch.from_numpy(_signs(self.head_dim, _seed_of(self.head_dim, self.seed)))

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


@kept
def _matrix(head_dim: int, seed: int | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if (device.type, dtype) == ("cpu", torch.float64):
        build = _signed_hadamard if _is_power_of_two(head_dim) else _haar
        return torch.from_numpy(build(head_dim, _seed_of(head_dim, seed)))
    return _matrix(head_dim, seed, torch.device("cpu"), torch.float64).to(device, dtype)


def _seed_of(head_dim: int, seed: int | None) -> int:
    return FORMAT_SEEDS[head_dim] if seed is None else seed


def _is_power_of_two(head_dim: int) -> bool:
    return head_dim & (head_dim - 1) == 0


def _signs(head_dim: int, seed: int) -> npt.NDArray[np.float64]:
    rounds = 4 if head_dim >= MIN_HEAD_DIM_OF_FOUR_ROUNDS else 6
    return np.stack([random_signs(f"rotation/hadamard/{head_dim}/{seed}/{i}", head_dim) for i in range(rounds)])


def _signed_hadamard(head_dim: int, seed: int) -> npt.NDArray[np.float64]:
    hadamard = np.ones((1, 1))
    while len(hadamard) < head_dim:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    rotation, signs = np.eye(head_dim), _signs(head_dim, seed)
    for round_signs in signs:
        rotation = hadamard @ (round_signs[:, None] * rotation)
    return np.asarray(rotation / head_dim ** (len(signs) // 2))


def _haar(head_dim: int, seed: int) -> npt.NDArray[np.float64]:
    gaussian = random_normal(f"rotation/qr/{head_dim}/{seed}", (head_dim, head_dim))
    q, r = np.linalg.qr(gaussian)
    # The factorisation leaves column signs to the library; a positive diagonal of R fixes them.
    return np.ascontiguousarray(q * np.sign(np.diag(r)))
