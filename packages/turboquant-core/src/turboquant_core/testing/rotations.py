"""What a rotation costs the inputs that a poor one fails on: vectors of few or of equal coordinates."""

from collections.abc import Iterator

import torch

from turboquant_core.config import WHOLE_BITS
from turboquant_core.testing.lloyd_max import lloyd_max_centroids, lloyd_max_mse


def structured_inputs(head_dim: int) -> Iterator[torch.Tensor]:
    """The kinds, each float64 [num_vectors, head_dim] of unit length; every kind counts by its mean.

    One-hot; two-hot with equal and with opposite signs, of neighbours and of channels a quarter and half of head_dim
    apart, as rotary partners are; and blocks of equal magnitudes, of one sign and of alternating ones.
    """
    one_hot = torch.eye(head_dim, dtype=torch.float64)
    yield one_hot
    for sign in (1, -1):
        yield torch.cat([one_hot[:-k] + sign * one_hot[k:] for k in (1, head_dim // 4, head_dim // 2)]) / 2**0.5
    sizes = {4, 8, 16, 32, 64, 128, 256, head_dim} & set(range(head_dim + 1))
    blocks = [one_hot[: head_dim // n * n].view(-1, n, head_dim).sum(1) / n**0.5 for n in sorted(sizes)]
    alternating = 1 - 2 * (torch.arange(head_dim) % 2).double()
    yield torch.cat([*blocks, *(block * alternating for block in blocks)])


def worst_excess(matrix: torch.Tensor, *, enough: float = float("inf")) -> float:
    """How far the worst kind's mean square error is above the least at its worst width: 0.01 is one per cent.

    Coordinates go to Lloyd-Max centroids, whose cells are finest where most coordinates are.

    Args:
        matrix: Π, float64 [head_dim, head_dim].
        enough: What is worse than this need not be known exactly.
    """
    head_dim = len(matrix)
    worst = -1.0
    for x in structured_inputs(head_dim):
        rotated = x @ matrix.T
        # Fine codes tell rotations apart first.
        for bits in sorted(WHOLE_BITS, reverse=True):
            positive = torch.from_numpy(lloyd_max_centroids(head_dim, bits))
            decoded = positive[torch.bucketize(rotated.abs(), (positive[1:] + positive[:-1]) / 2)]
            error = float((rotated.abs() - decoded).square().sum(-1).mean())
            worst = max(worst, error / lloyd_max_mse(head_dim, bits) - 1)
            if worst > enough:
                return worst
    return worst


def entry_bits(matrix: torch.Tensor) -> int:
    """Bits of the mantissa that hold every entry of a matrix of integers over a power of two."""
    integers = (matrix * 2.0**40).long().abs()
    odd = integers // (integers & -integers).clamp(min=1)
    return int(odd.max()).bit_length()
