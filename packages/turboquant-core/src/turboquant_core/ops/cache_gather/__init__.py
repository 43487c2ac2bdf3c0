"""Dequantise tokens of the paged cache into dense tensors."""

from turboquant_core.ops.cache_gather.api import cache_gather, cumulative_lengths

__all__ = ["cache_gather", "cumulative_lengths"]
