"""How the fragment kernel is launched."""

from turboquant_core.ops.decode_attention.sizes import MANY_ROWS, Card, DecodeLaunch, DecodeShape, launch_of_tiles


def fragment_launch(shape: DecodeShape, card: Card) -> DecodeLaunch:
    """The launch of the register-fragment kernel."""
    # The tensor cores take eight columns, of keys two for a query; sixteen queries fit the registers at head_dim 128.
    columns = 4 if shape.num_columns <= 4 else 8 if shape.num_columns <= 8 or shape.head_dim > 128 else 16
    # One warp a program: registers alone (160 to 250 a thread) bound how many programs a multiprocessor holds. One wave
    # of them is balanced by the schedule.
    resident = 12 if max(8, columns) * shape.head_dim <= 1024 else 8
    programs = resident * card.num_multiprocessors / (shape.num_kv_heads * -(-shape.num_columns // columns))
    tiles = shape.max_tokens / (64 * programs)
    # Longer tiles share the softmax's reductions among more tokens, and one wave of programs needs them to keep the
    # memory busy. Where a program has two to four of them, shorter ones share the work more evenly; where it has but
    # one, longer ones leave less to merge. Above head_dim 128 only shorter ones fit the registers.
    short = shape.head_dim > 128 or shape.batch >= MANY_ROWS or 1 < tiles <= 4
    return launch_of_tiles(shape, card, columns, tile=32 if short else 64, resident=resident, stages=2)
