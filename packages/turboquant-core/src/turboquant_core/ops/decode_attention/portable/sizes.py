"""How the portable kernels are launched."""

from dataclasses import dataclass

from turboquant_core.ops._card import Card, overlaps
from turboquant_core.ops.decode_attention.sizes import DecodeLaunch, DecodeShape, share_among_workers

MANY_ROWS = 16


@dataclass(frozen=True)
class PortableLaunch(DecodeLaunch):
    """Sizes of one launch of the portable kernels.

    Attributes:
        num_warps: Warps of a program that attends.
        prepare_heads: Query heads of a program that prepares.
        prepare_positions: Operand positions that it rotates to.
        prepare_channels: Channels that it multiplies at a time.
        merge_heads: Query heads of a program that merges.
        merge_slots: Partial results that it reads at a time.
        merge_channels: Output channels that it un-rotates to at a time.
    """

    num_warps: int
    prepare_heads: int
    prepare_positions: int
    prepare_channels: int
    merge_heads: int
    merge_slots: int
    merge_channels: int


def portable_launch(shape: DecodeShape, card: Card) -> PortableLaunch:
    """The launch of the portable kernels."""
    # tl.dot takes at least sixteen rows.
    columns = 16 if shape.num_columns <= 16 or shape.head_dim > 128 else 32
    tile = 64 if shape.head_dim <= 128 else 32
    # Above 256 channels twice the warps hold the tile.
    resident, num_warps = (4, 2) if shape.head_dim <= 256 else (2, 4)
    # Multiprocessors are not equally fast: with many rows a second wave evens them out. With few, merging twice as many
    # partial results costs more than that.
    waves = 2 if shape.batch >= MANY_ROWS else 1
    num_workers = share_among_workers(shape, card, columns, tile=tile, resident=resident, waves=waves)
    # Few rows have many partial results each: a program for every head reads many at a time. Many rows have few: a
    # program un-rotates sixteen heads at once on the tensor cores.
    # Sixteen heads of more than 256 channels, as operands of an exact product, would not fit the registers.
    many_slots = num_workers > 16 * shape.batch or shape.head_dim > 256
    num_query_heads = shape.batch * shape.num_kv_heads * shape.num_columns
    # Small calls are latency: many programs that each read little of the rotation.
    small = num_query_heads <= 16 * card.num_multiprocessors
    narrow = 1 if shape.head_dim <= 128 else 2 if shape.head_dim <= 256 else 4
    return PortableLaunch(
        columns=columns,
        padded_columns=-(-shape.num_columns // columns) * columns,
        tile=tile,
        num_workers=num_workers,
        overlap=overlaps(card),
        num_warps=num_warps,
        prepare_heads=16 if small else 64,
        prepare_positions=32 if small else 64,
        prepare_channels=256 if shape.head_dim <= 256 else 64,
        merge_heads=1 if many_slots else 16,
        merge_slots=(128 if many_slots else 8) // narrow,
        merge_channels=128 // narrow,
    )
