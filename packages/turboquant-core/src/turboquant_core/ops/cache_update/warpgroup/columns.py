"""In which order the product of a tile with the rotation has its channels."""

import torch


def finest_plane(bits: int) -> int:
    """The narrowest plane of codes of that many bits (see `turboquant_core.packing`)."""
    return bits & -bits


def product_columns(channels: int, bits: int) -> torch.Tensor:
    """The channel of each column, int64 [channels].

    Four neighbouring threads share a row of the product; each holds columns 2t, 2t + 1, 8 + 2t, 8 + 2t + 1 and so on.
    Columns are ordered so that those of a thread are the channels of whole, neighbouring bytes of every plane: it packs
    and stores them without exchanging anything. `natural_order` in `kernel` undoes the order.
    """
    run = finest_plane(bits) * channels // 32
    column = torch.arange(channels, device="cpu")
    thread, place = column % 8 // 2, column // 8 * 2 + column % 2
    return place // run * (4 * run) + thread * run + place % run
