"""Attend on dense tokens, merged with what attention on codes gave."""

from turboquant_core.ops.merge_attention.api import merge_attention

__all__ = ["merge_attention"]
