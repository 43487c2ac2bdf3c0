"""How the fragment kernels are launched."""

from dataclasses import dataclass

from turboquant_core.ops._card import Card, overlaps
from turboquant_core.ops.decode_attention.sizes import DecodeLaunch, DecodeShape, share_among_workers

MANY_ROWS = 8
MAX_MERGE_WARPS = 8
# Tiles of 64 tokens that a program has to have for a second wave to pay.
LONG_SHARE = 32
# Of a multiprocessor.
REGISTERS = 65536


@dataclass(frozen=True)
class FragmentLaunch(DecodeLaunch):
    """Sizes of one launch of the fragment kernels.

    Attributes:
        stages: Tiles in flight: the one that is worked on and those on their way.
        max_registers: Of a thread that attends.
        merge_slots: Partial results that a program reads at a time.
        merge_warps: Its warps.
    """

    stages: int
    max_registers: int
    merge_slots: int
    merge_warps: int


def fragment_launch(shape: DecodeShape, card: Card) -> FragmentLaunch:
    """The launch of the register-fragment kernels."""
    # The tensor cores take eight columns, of keys two for a query; sixteen queries fit the registers at head_dim 128.
    columns = 4 if shape.num_columns <= 4 else 8 if shape.num_columns <= 8 or shape.head_dim > 128 else 16
    groups = shape.num_kv_heads * -(-shape.num_columns // columns)
    # One warp a program: registers bound how many programs a multiprocessor holds, four schedulers equally many each.
    wide = max(8, columns) * shape.head_dim > 1024
    resident = 8 if wide else 12
    tiles = shape.max_tokens * groups / (64 * resident * card.num_multiprocessors)
    # Longer tiles share the softmax's reductions among more tokens, and one wave of programs needs them to keep the
    # memory busy. Where a program has two to four of them, shorter ones share the work more evenly; where it has but
    # one, longer ones leave less to merge. Above head_dim 128 only shorter ones fit the registers.
    short = shape.head_dim > 128 or (shape.batch >= MANY_ROWS and not wide) or 1 < tiles <= 4
    tile = 32 if short else 64
    if short and columns == 4 and shape.head_dim <= 128 and shape.batch >= MANY_ROWS:
        resident = 16
    # Multiprocessors are not equally fast: where there is much to do a second wave evens them out. Starting it and
    # merging twice as many partial results cost more than that otherwise.
    waves = 2 if shape.batch >= 2 * MANY_ROWS and tiles >= LONG_SHARE else 1
    num_workers = share_among_workers(shape, card, columns, tile=tile, resident=resident, waves=waves)
    # Of partial results a warp holds 2,048 channels at a time, or twice that where so all are held. A row has at most
    # one for each tile.
    row_slots = min(-(-num_workers // shape.batch) + 1, -(-shape.max_tokens // (shape.batch * tile)))
    warp_slots = 2048 // max(128, shape.head_dim)
    if row_slots > MAX_MERGE_WARPS * warp_slots:
        warp_slots *= 2
    merge_warps = min(MAX_MERGE_WARPS, 1 << (-(-row_slots // warp_slots) - 1).bit_length())
    return FragmentLaunch(
        columns=columns,
        padded_columns=-(-shape.num_columns // columns) * columns,
        tile=tile,
        num_workers=num_workers,
        overlap=overlaps(card),
        stages=2,
        max_registers=min(255, REGISTERS // (32 * resident) // 8 * 8),
        merge_slots=warp_slots * merge_warps,
        merge_warps=merge_warps,
    )
