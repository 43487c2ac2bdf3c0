"""Where every byte of a paged cache lies."""

from dataclasses import dataclass
from functools import cached_property

import torch

from turboquant_core._checks import check_int
from turboquant_core.config import TurboQuantConfig
from turboquant_core.scale import SCALE_DTYPE


@dataclass(frozen=True)
class Plane:
    """One field of every slot of a head's page, stored together.

    Attributes:
        offset: First byte, from the start of the head's part of the page.
        slot_stride: Bytes from one token's entry to the next.
    """

    offset: int
    slot_stride: int


@dataclass(frozen=True)
class PageViews:
    """The fields of all pages as tensors that share the pages' memory.

    Attributes:
        key_codes: uint8 [num_blocks, num_kv_heads, block_size, code_bytes].
        value_codes: uint8, the same for values.
        key_scales: float16 [num_blocks, num_kv_heads, block_size, num_scales].
        value_scales: float16, the same for values.
    """

    key_codes: torch.Tensor
    value_codes: torch.Tensor
    key_scales: torch.Tensor
    value_scales: torch.Tensor


@dataclass(frozen=True)
class KVCacheLayout:
    """The layout of a page: per KV head four planes, key codes, value codes, key scales, value scales.

    Planes keep code rows aligned (64 bytes at head_dim 128 and 4 bits) and let neighbouring tokens' scales be read
    together. Offsets, strides and sizes are known here alone: launchers take them from a layout and hand them
    to kernels.

    Args:
        config: What is stored for one head.
        num_kv_heads: KV heads in a page.
        block_size: Tokens in a page.
    """

    config: TurboQuantConfig
    num_kv_heads: int
    block_size: int

    def __post_init__(self) -> None:
        check_int("num_kv_heads", self.num_kv_heads, 1)
        check_int("block_size", self.block_size, 1)
        if self.key_scales.offset % SCALE_DTYPE.itemsize or self.head_bytes % SCALE_DTYPE.itemsize:
            raise ValueError(
                f"block_size is {self.block_size}; with {self.config.key_bits}/{self.config.value_bits} bits at "
                f"head_dim {self.config.head_dim} an odd one puts scales on odd addresses. Use an even block_size."
            )

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of one token's key and value for one KV head."""
        return self.config.slot_bytes

    @cached_property
    def head_bytes(self) -> int:
        """Bytes of one KV head's part of a page."""
        return self.block_size * self.slot_bytes

    @cached_property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.num_kv_heads * self.head_bytes

    @cached_property
    def key_codes(self) -> Plane:
        """Packed key codes."""
        return Plane(0, self.config.key_format.code_bytes)

    @cached_property
    def value_codes(self) -> Plane:
        """Packed value codes."""
        return Plane(self._end(self.key_codes), self.config.value_format.code_bytes)

    @cached_property
    def key_scales(self) -> Plane:
        """Key scales."""
        return Plane(self._end(self.value_codes), self.config.key_format.scale_bytes)

    @cached_property
    def value_scales(self) -> Plane:
        """Value scales."""
        return Plane(self._end(self.key_scales), self.config.value_format.scale_bytes)

    def allocate(self, num_blocks: int, device: torch.device | str | None = None) -> torch.Tensor:
        """Zeroed pages, uint8 [num_blocks, num_kv_heads, head_bytes]."""
        shape = (check_int("num_blocks", num_blocks, 0), self.num_kv_heads, self.head_bytes)
        return torch.zeros(shape, dtype=torch.uint8, device=device)

    def views(self, pages: torch.Tensor) -> PageViews:
        """The fields of `pages`, uint8 [num_blocks, num_kv_heads, head_bytes], without copying.

        Raises:
            ValueError: If type or shape is another.
        """
        expected = (self.num_kv_heads, self.head_bytes)
        if pages.dtype != torch.uint8 or pages.ndim != 3 or tuple(pages.shape[1:]) != expected:
            raise ValueError(
                f"pages are {pages.dtype} {list(pages.shape)}; this layout takes torch.uint8 [num_blocks, "
                f"{expected[0]}, {expected[1]}]"
            )
        keys, values = self.config.key_format, self.config.value_format
        as_scales = pages.view(SCALE_DTYPE)
        return PageViews(
            self._field(pages, self.key_codes, keys.code_bytes),
            self._field(pages, self.value_codes, values.code_bytes),
            self._field(as_scales, self.key_scales, keys.num_scales),
            self._field(as_scales, self.value_scales, values.num_scales),
        )

    def _end(self, plane: Plane) -> int:
        return plane.offset + self.block_size * plane.slot_stride

    def _field(self, pages: torch.Tensor, plane: Plane, size: int) -> torch.Tensor:
        """Entries of `size` elements of every slot, [num_blocks, num_kv_heads, block_size, size]."""
        # In elements of the pages' type, whichever they are read as. One operation: every call of a kernel does this.
        width = pages.element_size()
        block_stride, head_stride, _ = pages.stride()
        return pages.as_strided(
            (pages.shape[0], self.num_kv_heads, self.block_size, size),
            (block_stride, head_stride, plane.slot_stride // width, 1),
            pages.storage_offset() + plane.offset // width,
        )
