"""The nearest centroids by lookup in the 32 lanes of a warp, which needs neither shared memory nor a barrier."""

from dataclasses import dataclass
from functools import cache

import torch

from turboquant_core.codebook import grid_codebook
from turboquant_core.ops.cache_update.grid_table import cell_entries, one_boundary_a_cell

LANES = 32
# A coordinate becomes fixed point as the mantissa of a float32 in [1, 2).
FIXED_BITS = 23
SHIFT = FIXED_BITS - 5
# A little less than 2^23, so that 1 stays below 2, and even, so that the middle is no tie.
UNITS = 2**FIXED_BITS - 2
FLOAT_ONE = 0x3F800000
# Past the outermost boundary all coordinates have one centroid: the range ends just behind it.
MARGIN = 1.001
MAX_BITS = 4


@dataclass(frozen=True)
class LaneTable:
    """The nearest centroid of a coordinate y, for all y but those within a rounding of a boundary.

    With F the bits of the float32 1 + saturate(y * factor + 0.5) * UNITS / 2^23, its rank is
    (F + lanes[0][cell]) >> SHIFT, where the cell is F >> SHIFT modulo LANES. As in
    `grid_table`, a cell holds one boundary at most; here they cover just the range in which
    boundaries lie.

    Attributes:
        lanes: int32 [2, LANES]: what to add in each cell, and the bits of each float32 centroid.
        factor: Coordinates to the range 1.
    """

    lanes: torch.Tensor
    factor: float


@cache
def lane_table(head_dim: int, bits: int, device: torch.device) -> LaneTable:
    """The table for the codebook of that size.

    Raises:
        ValueError: If boundaries are too close for LANES cells.
    """
    codebook = grid_codebook(head_dim, bits)
    factor = 0.5 / (MARGIN * float(codebook.boundaries[-1]))
    # The first fixed-point number above each boundary: a coordinate on a boundary takes the lower centroid.
    first_above = ((codebook.boundaries * factor + 0.5) * UNITS).floor().to(torch.int64) + 1
    if bits > MAX_BITS or not one_boundary_a_cell(first_above, SHIFT):
        raise ValueError(f"{bits} bits at head_dim {head_dim} need more than {LANES} cells. Use at most {MAX_BITS}.")
    entries = cell_entries(first_above, SHIFT, LANES, FLOAT_ONE)
    centroids = torch.zeros(LANES, device="cpu")
    centroids[: 2**bits] = codebook.centroids
    return LaneTable(torch.stack([entries, centroids.view(torch.int32)]).to(device), factor)
