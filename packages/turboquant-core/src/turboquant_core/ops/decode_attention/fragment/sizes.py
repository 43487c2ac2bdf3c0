"""How the fragment kernel is launched."""

from turboquant_core.ops.decode_attention.sizes import Card, DecodeLaunch, DecodeShape, launch_of_tiles


def fragment_launch(shape: DecodeShape, card: Card) -> DecodeLaunch:
    """The launch of the register-fragment kernel."""
    # The tensor cores take eight columns; sixteen still fit the registers beside head_dim 128.
    columns = 8 if shape.num_columns <= 8 or shape.head_dim > 128 else 16
    # Longer tiles share the softmax's reductions among more tokens. Where a look-up takes a polynomial's registers, or
    # head_dim 256 twice the registers, half the length keeps enough warps on a multiprocessor.
    wide = shape.head_dim > 128 or max(shape.key_bits, shape.value_bits) > 4
    # One warp a program: registers alone (160 to 250 a thread) bound how many programs a multiprocessor holds. One wave
    # of them is balanced by the schedule.
    resident = 12 if columns * shape.head_dim <= 1024 else 8
    return launch_of_tiles(shape, card, columns, tile=32 if wide else 64, resident=resident, stages=2)
