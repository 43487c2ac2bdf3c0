"""How the portable kernel is launched."""

from turboquant_core.ops.decode_attention.sizes import Card, DecodeLaunch, DecodeShape, launch_of_tiles


def portable_launch(shape: DecodeShape, card: Card) -> DecodeLaunch:
    """The launch of the portable Triton kernel."""
    # tl.dot takes at least sixteen rows.
    columns = 16 if shape.num_columns <= 16 or shape.head_dim > 128 else 32
    tile = 64 if shape.head_dim <= 128 else 32
    # Above 256 channels twice the warps hold the tile.
    resident, num_warps = (4, 2) if shape.head_dim <= 256 else (2, 4)
    return launch_of_tiles(shape, card, columns, tile=tile, resident=resident, num_warps=num_warps)
