"""The rotation as the 16-bit matrices that tensor cores multiply with."""

from dataclasses import dataclass
from functools import cache

import torch

from turboquant_core.ops._padding import padded_octet
from turboquant_core.rotation import Rotation

# Entries are at most 1. Times 2^11, the second part is still a normal float16, and products stay far from overflow.
MATRIX_SCALE = 2.0**11
# What the parts may leave of a row of Π, as a length: below what float32 products lose anyway.
MAX_RESIDUE = 2.0**-22
MAX_PARTS = 3


@dataclass(frozen=True)
class SplitRotation:
    """MATRIX_SCALE * Πᵀ as a sum of matrices, the largest first.

    Π of a power of two is a matrix of integers of few bits times a power of two: the sum is exact.

    Rows are padded with zeros at the end. Columns are padded after every eighth of the channels: channel c lies at
    (c // octet) * padded_octet + c % octet. All planes of `turboquant_core.packing` are then reshapes of a row of
    codes: with w bits, n = w * octet, and i and j of channel j + i * n are still separate digits of its place.

    Attributes:
        parts: float16 or bfloat16 [num_parts, padded_head_dim, padded_head_dim].
    """

    parts: torch.Tensor

    @property
    def num_parts(self) -> int:
        """How many matrices add up to the rotation."""
        return self.parts.shape[0]


@cache
def split_rotation(head_dim: int, dtype: torch.dtype, device: torch.device) -> SplitRotation:
    """The format's rotation for that head_dim, in float16 or bfloat16."""
    return _sum_of_parts(_padded(Rotation(head_dim).matrix.T), dtype, device)


@cache
def split_halves_rotation(head_dim: int, dtype: torch.dtype, device: torch.device) -> SplitRotation:
    """The same of `HalvesRotation`; columns of the two halves take turns, each half padded by itself."""
    half = _padded(Rotation(head_dim // 2).matrix.T)[: head_dim // 2]
    size = 2 * half.shape[1]
    matrix = torch.zeros(size, half.shape[1], 2, dtype=half.dtype, device="cpu")
    for i in range(2):
        matrix[i * len(half) : (i + 1) * len(half), :, i] = half
    return _sum_of_parts(matrix.reshape(size, size), dtype, device)


def _padded(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix of rows and columns of channels with both padded."""
    head_dim = len(matrix)
    octet, padded = head_dim // 8, padded_octet(head_dim)
    result = torch.zeros(8 * padded, 8, padded, dtype=torch.float64, device="cpu")
    result[:head_dim, :, :octet] = matrix.reshape(head_dim, 8, octet)
    return result.reshape(8 * padded, 8 * padded)


def _sum_of_parts(matrix: torch.Tensor, dtype: torch.dtype, device: torch.device) -> SplitRotation:
    residue = matrix * MATRIX_SCALE
    parts: list[torch.Tensor] = []
    while len(parts) < MAX_PARTS and residue.norm(dim=0).max() > MAX_RESIDUE * MATRIX_SCALE:
        parts.append(residue.to(dtype))
        residue = residue - parts[-1].double()
    return SplitRotation(torch.stack(parts).to(device))
