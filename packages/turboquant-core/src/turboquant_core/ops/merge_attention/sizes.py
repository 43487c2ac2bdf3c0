"""What the kernel that merges is compiled for."""

from functools import cache
from typing import Any

import torch

from turboquant_core.ops._card import card_of, float32_precision, overlap_options
from turboquant_core.ops._dispatch import interpreting
from turboquant_core.ops._padding import power_of_two

# What products take at least.
MIN_BLOCK = 16
MAX_QUERIES = 32
MAX_COLUMNS = 32
# Bytes of a head from which on it takes twice the warps and half the queries to keep registers.
WIDE_BYTES = 1024
MAX_TILE_BYTES = 32768
# Of queries and keys, for each product of a sum of them.
MAX_PRODUCT_BYTES = 256


# Every layer of every step asks.
@cache
def merge_sizes(
    head_dim: int, dtypes: tuple[torch.dtype, torch.dtype], num_queries: int, num_columns: int, device: torch.device
) -> dict[str, Any]:
    """Sizes and options of a launch.

    Args:
        head_dim: Channels.
        dtypes: Of the query and of raw tokens.
        num_queries: Query heads of a KV head of a row.
        num_columns: Raw tokens of a row.
        device: Where they are.
    """
    block_dim = max(MIN_BLOCK, power_of_two(head_dim))
    itemsize = max(dtype.itemsize for dtype in dtypes)
    head_bytes = block_dim * itemsize
    is_wide = head_bytes >= WIDE_BYTES
    max_columns = min(MAX_COLUMNS, MAX_TILE_BYTES // head_bytes)
    return {
        "block_queries": max(MIN_BLOCK, min(MAX_QUERIES // (1 + is_wide), power_of_two(num_queries))),
        "block_columns": max(MIN_BLOCK, min(max_columns, power_of_two(num_columns))),
        "block_dim": block_dim,
        "block_channels": min(block_dim, MAX_PRODUCT_BYTES // itemsize),
        "precision": float32_precision(card_of(device)),
        "widen": interpreting() or dtypes[0] != dtypes[1],
        "num_warps": 8 if is_wide else 4,
        # A second tile on its way takes shared memory.
        "num_stages": 1 if is_wide else 2,
        **overlap_options(device),
    }
