"""A store that grows, of its parts."""

import torch

from turboquant_core import TurboQuantConfig
from turboquant_hf.storage.full_precision import FullPrecision
from turboquant_hf.storage.growing.length import GrowingLength
from turboquant_hf.storage.growing.pages import GrowingPages
from turboquant_hf.storage.store import Store
from turboquant_hf.storage.tables import CODES_ONLY, FullPrecisionSizes


def growing_store(
    config: TurboQuantConfig,
    batch_size: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    sizes: FullPrecisionSizes = CODES_ONLY,
    *,
    window: int | None = None,
) -> Store:
    """A store that has room for any number of tokens.

    Args:
        config: What is stored for one head.
        batch_size: Rows.
        num_kv_heads: Heads of a row.
        dtype: Type of keys and values.
        device: Where they are.
        sizes: Tokens that are stored as they are.
        window: Tokens that a token sees, itself included, at least as many as `sizes.recent`, where those before may be
            dropped; None to keep all.
    """
    full_precision = None
    if sizes != CODES_ONLY:
        full_precision = FullPrecision.empty(sizes, (batch_size, num_kv_heads), config.head_dims, dtype, device)
    pages = GrowingPages.empty(config, batch_size, num_kv_heads, device)
    return Store(pages, GrowingLength(sizes, window), full_precision)
