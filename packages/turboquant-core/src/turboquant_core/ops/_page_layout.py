"""A layout as kernels take it: one argument, compiled in."""

from functools import cache
from typing import NamedTuple

from turboquant_core.layout import KVCacheLayout, Plane


class StoredVectors(NamedTuple):
    """Where the keys, or the values, of a page lie; bytes, from the start of a head's part of the page.

    Attributes:
        bits: Of a coordinate.
        codes: First byte of the codes.
        code_stride: From one token's codes to the next one's.
        scales: First byte of the scales.
        scale_stride: From one token's scale to the next one's.
    """

    bits: int
    codes: int
    code_stride: int
    scales: int
    scale_stride: int


class PageLayout(NamedTuple):
    """Sizes of a layout, and where in a page it has keys and values."""

    num_kv_heads: int
    block_size: int
    head_dim: int
    stored_keys: StoredVectors
    stored_values: StoredVectors


# Every call of an operation asks.
@cache
def page_layout(layout: KVCacheLayout) -> PageLayout:
    """What kernels know of a layout with whole bits."""
    config = layout.config
    return PageLayout(
        layout.num_kv_heads,
        layout.block_size,
        config.head_dim,
        _stored(config.key_bits, layout.key_codes, layout.key_scales),
        _stored(config.value_bits, layout.value_codes, layout.value_scales),
    )


def _stored(bits: float, codes: Plane, scales: Plane) -> StoredVectors:
    return StoredVectors(int(bits), codes.offset, codes.slot_stride, scales.offset, scales.slot_stride)
