"""Attend on raw tokens, and merge that with what attention on codes gave."""

from turboquant_core.ops.merge_attention.api import merge_attention, merge_copies

__all__ = ["merge_attention", "merge_copies"]
