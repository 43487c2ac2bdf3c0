"""What kernels look codes up as."""

import numpy as np
import numpy.typing as npt

from turboquant_core.codebook import grid_codebook

# A byte permute selects by nibbles: three bits of the place, and one that says which of two tables, or the sign.
MAX_PERMUTED_BITS = 4


def unit_variance_centroids(head_dim: int, bits: int) -> npt.NDArray[np.float64]:
    """What each code means, times sqrt(head_dim): centroids of a coordinate of unit variance."""
    return np.asarray(grid_codebook(head_dim, bits).centroids_by_code.numpy() * np.sqrt(head_dim), dtype=np.float64)
