"""A store that is made once, of its parts."""

import torch

from turboquant_core import TurboQuantConfig
from turboquant_hf.storage.static.full_precision import StaticFullPrecision
from turboquant_hf.storage.static.length import StaticLength
from turboquant_hf.storage.static.pages import StaticPages
from turboquant_hf.storage.store import Store
from turboquant_hf.storage.tables import CODES_ONLY, FullPrecisionSizes


def static_store(
    config: TurboQuantConfig,
    batch_size: int,
    num_kv_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
    sizes: FullPrecisionSizes = CODES_ONLY,
) -> Store:
    """A store of at most `max_length` tokens a row, in tensors that keep their addresses; see `growing_store`."""
    full_precision = None
    if sizes != CODES_ONLY:
        full_precision = StaticFullPrecision.empty(sizes, (batch_size, num_kv_heads), config.head_dims, dtype, device)
    pages = StaticPages(config, batch_size, num_kv_heads, max_length, device)
    return Store(pages, StaticLength(sizes, max_length, device), full_precision)
