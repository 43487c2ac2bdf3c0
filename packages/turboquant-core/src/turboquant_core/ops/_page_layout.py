"""A layout as kernels take it: one argument, compiled in."""

from functools import cache
from typing import NamedTuple

from turboquant_core.layout import KVCacheLayout, Plane
from turboquant_core.vector_format import VectorFormat


class StoredVectors(NamedTuple):
    """Where the keys, or the values, of a page lie; bytes, from the start of a head's part of the page.

    Attributes:
        bits: Of a coordinate, in the mean over halves if split.
        split: Whether the first half of the channels has one bit more, and the second one less.
        codes: First byte of the codes.
        code_stride: From one token's codes to the next one's.
        scales: First byte of the scales.
        scale_stride: From one token's scale to the next one's.
    """

    bits: int
    split: bool
    codes: int
    code_stride: int
    scales: int
    scale_stride: int

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of a coordinate in each group of channels: one group, or two halves."""
        return (self.bits + 1, self.bits - 1) if self.split else (self.bits,)


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
        _stored(config.key_format, layout.key_codes, layout.key_scales),
        _stored(config.value_format, layout.value_codes, layout.value_scales),
    )


def _stored(stored: VectorFormat, codes: Plane, scales: Plane) -> StoredVectors:
    return StoredVectors(
        int(stored.bits), stored.split, codes.offset, codes.slot_stride, scales.offset, scales.slot_stride
    )
