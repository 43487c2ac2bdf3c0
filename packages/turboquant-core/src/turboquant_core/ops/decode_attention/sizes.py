"""How decode attention is launched: a pure function of shapes and card."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from turboquant_core.ops._card import Card


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
        overlap: Launch each kernel while the one before it runs.
    """

    columns: int
    padded_columns: int
    tile: int
    num_workers: int
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


def share_among_workers(shape: DecodeShape, card: Card, columns: int, *, tile: int, resident: int, waves: int) -> int:
    """Workers of each KV head and group of `columns` columns, for `waves` waves of `resident` programs a processor."""
    groups = shape.num_kv_heads * -(-shape.num_columns // columns)
    most_tiles = -(-shape.max_tokens // tile) + shape.batch
    return max(1, min(waves * resident * card.num_multiprocessors // groups, most_tiles))
