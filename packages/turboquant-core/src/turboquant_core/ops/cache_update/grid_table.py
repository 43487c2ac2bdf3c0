"""The centroids nearest to coordinates of unit vectors by table lookup, in as many steps whatever the bits are."""

from dataclasses import dataclass
from functools import cache

import torch

from turboquant_core.codebook import grid_codebook

# Coordinates become fixed point by a float32 addition: in [2^23, 2^24) the mantissa counts units of one. A little less
# than 2^22 units for 1.0 leaves room for a coordinate that rounding pushed past 1.
UNITS = 2**22 - 8
CENTER = 2**22
FIXED_BITS = 23
FLOAT_ONE_UNIT = 0x4B000000
MAX_CELLS = 4096


@dataclass(frozen=True)
class GridTable:
    """The nearest centroid of y in [-1, 1], for all y but those within 2⁻²² of a boundary.

    With F the fixed-point y as the bits of the float32 y * UNITS + CENTER + 2²³, its rank is
    (F + entries[cell]) >> shift, where the cell is F >> shift less the shifted exponent bits. A cell holds one
    boundary at most; its entry carries the boundaries below the cell, and adding F carries past the boundary in it.

    Attributes:
        entries: int32 [num_cells], a power of two of them.
        shift: Bits of the fixed-point number below the cell.
    """

    entries: torch.Tensor
    shift: int


@cache
def grid_table(head_dim: int, bits: int, device: torch.device) -> GridTable:
    """The smallest table for the codebook of that size.

    Raises:
        ValueError: If boundaries are too close for `MAX_CELLS` cells.
    """
    boundaries = grid_codebook(head_dim, bits).boundaries
    # The first fixed-point number above each boundary: a coordinate on a boundary takes the lower centroid.
    first_above = CENTER + (boundaries * UNITS).floor().to(torch.int64) + 1
    num_cells = 1
    while num_cells <= MAX_CELLS:
        shift = FIXED_BITS - num_cells.bit_length() + 1
        if one_boundary_a_cell(first_above, shift):
            return GridTable(cell_entries(first_above, shift, num_cells, FLOAT_ONE_UNIT).to(device), shift)
        num_cells *= 2
    raise ValueError(f"{bits} bits at head_dim {head_dim} need more than {MAX_CELLS} cells. Use fewer bits.")


def one_boundary_a_cell(first_above: torch.Tensor, shift: int) -> bool:
    """Whether cells of 2^shift fixed-point numbers hold at most one of the boundaries each."""
    return bool(((first_above >> shift).diff() > 0).all())


def cell_entries(first_above: torch.Tensor, shift: int, num_cells: int, zero_bits: int) -> torch.Tensor:
    """What to add to the numbers of each cell, int32 [num_cells], so that their bits from `shift` on are the rank.

    Args:
        first_above: int64, ascending: the first fixed-point number above each boundary.
        shift: Bits of a number below the cell.
        num_cells: Cells, from number 0 on.
        zero_bits: What the float32 that carries a fixed-point number has as bits for the number 0.
    """
    start = torch.arange(num_cells, device="cpu") << shift
    below = torch.searchsorted(first_above, start)
    inside = torch.searchsorted(first_above, start + (1 << shift)) - below
    carry_at = torch.where(inside == 1, first_above[below.clamp(max=len(first_above) - 1)], start)
    return (((below + inside) << shift) - carry_at - zero_bits).to(torch.int32)
