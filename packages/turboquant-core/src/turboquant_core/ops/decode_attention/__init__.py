"""Attend with a few query tokens a row on the codes of a paged cache."""

from turboquant_core.ops.decode_attention.api import MAX_QUERY_LEN, decode_attention

__all__ = ["MAX_QUERY_LEN", "decode_attention"]
