"""How many bytes one stored vector takes, and which channels get which bits."""

from dataclasses import dataclass
from functools import cached_property

from turboquant_core._checks import check_bits, check_head_dim
from turboquant_core.packing import packed_bytes
from turboquant_core.scale import SCALE_BYTES

STORAGE_FORMAT = 2
"""What stored bytes mean (docs/format.md): another process, or a later one, reads them if its format is the same."""

# The paper's fractional widths (Section 4.3): a quarter of the channels, the outliers, get two bits more than the rest.
OUTLIER_BITS = {2.5: (4, 2), 3.5: (5, 3)}
OUTLIER_SHARE = 4

# Halves of fewer channels fill no product of the tensor cores.
MIN_SPLIT_HEAD_DIM = 48
SPLIT_BITS = (2, 3, 4)
"""Widths that a vector can be split at: half of its channels get one bit more, and the other half one less."""


def can_split(head_dim: int, bits: float) -> bool:
    """Whether a vector can be stored as two halves of unequal bits."""
    return bits in SPLIT_BITS and head_dim >= MIN_SPLIT_HEAD_DIM and head_dim % 16 == 0


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are rotated, scaled and coded together."""

    num_channels: int
    bits: int

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of the group's packed codes."""
        return packed_bytes(self.num_channels, self.bits)


@dataclass(frozen=True)
class VectorFormat:
    """The storage of one vector: the codes of each group, and one scale for each group.

    Args:
        head_dim: Channels of the vector, a multiple of 8 (of 32 for fractional bits; of 16, from 48 on, if split).
        bits: 1 to 8, or 2.5 or 3.5 for two groups, outlier channels first.
        split: Whether 2, 3 or 4 bits are those of two groups together: the first half of the channels at one bit more,
            and the second at one less. A code of either half make one code of twice the bits.
    """

    head_dim: int
    bits: float
    split: bool = False

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)
        if self.split and self.bits not in SPLIT_BITS:
            known = ", ".join(map(str, SPLIT_BITS))
            raise ValueError(f"bits is {self.bits}; {known} can be split. Use one of these, or do not split.")
        if self.split and not can_split(self.head_dim, self.bits):
            raise ValueError(
                f"head_dim is {self.head_dim}; a vector can be split at multiples of 16 from {MIN_SPLIT_HEAD_DIM} on. "
                "Do not split here."
            )
        if self.bits not in OUTLIER_BITS:
            check_bits(int(self.bits) if self.bits == int(self.bits) else self.bits)
        elif self.head_dim % (8 * OUTLIER_SHARE):
            raise ValueError(
                f"head_dim is {self.head_dim}; {self.bits} bits split it into quarters of whole bytes, so it must be a "
                f"multiple of {8 * OUTLIER_SHARE}. Use whole bits here."
            )

    @cached_property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """One group; for fractional bits the outlier channels and the rest; two halves if split."""
        if self.split:
            half, bits = self.head_dim // 2, int(self.bits)
            return ChannelGroup(half, bits + 1), ChannelGroup(half, bits - 1)
        if self.bits in OUTLIER_BITS:
            high, low = OUTLIER_BITS[self.bits]
            outliers = self.head_dim // OUTLIER_SHARE
            return ChannelGroup(outliers, high), ChannelGroup(self.head_dim - outliers, low)
        return (ChannelGroup(self.head_dim, int(self.bits)),)

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of packed codes."""
        return sum(group.code_bytes for group in self.groups)

    @cached_property
    def num_scales(self) -> int:
        """Stored scales, two bytes each."""
        return len(self.groups)

    @cached_property
    def scale_bytes(self) -> int:
        """Bytes of scales."""
        return self.num_scales * SCALE_BYTES

    @cached_property
    def nbytes(self) -> int:
        """Bytes of the whole vector."""
        return self.code_bytes + self.scale_bytes
