"""How decode attention is launched: a pure function of shapes and card."""

from collections.abc import Callable
from dataclasses import dataclass, replace

MANY_ROWS = 16


@dataclass(frozen=True)
class Card:
    """What of a GPU the launch depends on.

    Attributes:
        capability: (major, minor) compute capability.
        num_multiprocessors: Streaming multiprocessors.
    """

    capability: tuple[int, int]
    num_multiprocessors: int


@dataclass(frozen=True)
class DecodeShape:
    """What of a call the launch depends on; lengths are not part of it, so that one launch serves a CUDA graph.

    Attributes:
        batch: Rows.
        num_kv_heads: KV heads.
        head_dim: Dimension of every head.
        key_bits: Bits of a key coordinate.
        value_bits: Bits of a value coordinate.
        num_columns: Query heads of a KV head times query tokens of a row.
        max_tokens: The most tokens that the rows can have together.
    """

    batch: int
    num_kv_heads: int
    head_dim: int
    key_bits: int
    value_bits: int
    num_columns: int
    max_tokens: int


@dataclass(frozen=True)
class DecodeLaunch:
    """Sizes of one launch.

    Attributes:
        columns: Columns that a program attends for.
        padded_columns: All columns, rounded up to whole programs.
        tile: Tokens that a program attends to at a time.
        num_workers: Programs for each KV head and group of columns.
        num_warps: Warps of a program.
        stages: Tiles in flight: the one that is worked on and those on their way.
        prepare_heads: Query heads of a program that prepares.
        prepare_positions: Operand positions that it rotates to.
        prepare_channels: Channels that it multiplies at a time.
        merge_heads: Query heads of a program that merges.
        merge_slots: Partial results that it reads at a time.
        merge_channels: Output channels that it un-rotates to at a time.
        overlap: Launch each kernel while the one before it runs.
    """

    columns: int
    padded_columns: int
    tile: int
    num_workers: int
    num_warps: int
    stages: int
    prepare_heads: int
    prepare_positions: int
    prepare_channels: int
    merge_heads: int
    merge_slots: int
    merge_channels: int
    overlap: bool


def padded_batch(batch: int) -> int:
    """Rows as a power of two, at least 32: every size is another kernel to compile."""
    return max(32, 1 << (batch - 1).bit_length())


def representative_batches(launch_of: Callable[[int], DecodeLaunch], max_batch: int) -> list[int]:
    """The smallest batch for every set of kernels that batches from 1 to max_batch are launched with."""
    smallest: dict[tuple[DecodeLaunch, int], int] = {}
    for batch in range(1, max_batch + 1):
        # The number of workers is an argument; all else is compiled in.
        smallest.setdefault((replace(launch_of(batch), num_workers=0), padded_batch(batch)), batch)
    return list(smallest.values())


def overlapped(launch: DecodeLaunch) -> dict[str, bool]:
    """The launch option of a kernel that may start before the previous one has finished."""
    return {"launch_pdl": True} if launch.overlap else {}


def launch_of_tiles(
    shape: DecodeShape,
    card: Card,
    columns: int,
    *,
    tile: int,
    resident: int,
    num_warps: int = 1,
    stages: int = 1,
) -> DecodeLaunch:
    """The launch of a path whose programs attend for `columns` columns, a tile at a time, `resident` on a processor."""
    padded = -(-shape.num_columns // columns) * columns
    # Multiprocessors are not equally fast: with many rows a second wave evens them out. With few, merging twice as many
    # partial results costs more than that.
    waves = 2 if shape.batch >= MANY_ROWS else 1
    programs = waves * resident * card.num_multiprocessors
    most_tiles = -(-shape.max_tokens // tile) + shape.batch
    num_workers = max(1, min(programs // (shape.num_kv_heads * padded // columns), most_tiles))
    # Few rows have many partial results each: a program for every head reads many at a time. Many rows have few: a
    # program un-rotates sixteen heads at once on the tensor cores.
    # Sixteen heads of more than 256 channels, as operands of an exact product, would not fit the registers.
    many_slots = num_workers > 16 * shape.batch or shape.head_dim > 256
    num_query_heads = shape.batch * shape.num_kv_heads * shape.num_columns
    # Small calls are latency: many programs that each read little of the rotation.
    small = num_query_heads <= 16 * card.num_multiprocessors
    narrow = 1 if shape.head_dim <= 128 else 2 if shape.head_dim <= 256 else 4
    return DecodeLaunch(
        columns=columns,
        padded_columns=padded,
        tile=tile,
        num_workers=num_workers,
        num_warps=num_warps,
        stages=stages,
        prepare_heads=16 if small else 64,
        prepare_positions=32 if small else 64,
        prepare_channels=256 if shape.head_dim <= 256 else 64,
        merge_heads=1 if many_slots else 16,
        merge_slots=(128 if many_slots else 8) // narrow,
        merge_channels=128 // narrow,
        # Programmatic dependent launch came with Hopper.
        overlap=card.capability >= (9, 0),
    )
