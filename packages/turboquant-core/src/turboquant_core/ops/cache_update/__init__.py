"""Quantise new keys and values and write them into the paged cache."""

from turboquant_core.ops.cache_update.api import cache_update

__all__ = ["cache_update"]
