"""The card that a launch is for."""

from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Card:
    """What of a GPU the launch depends on.

    Attributes:
        capability: (major, minor) compute capability.
        num_multiprocessors: Streaming multiprocessors.
    """

    capability: tuple[int, int]
    num_multiprocessors: int


@cache
def card_of(device: torch.device) -> Card:
    """The card behind a device; the interpreter's CPU counts as a small one that has no inline assembly."""
    if device.type != "cuda":
        return Card((0, 0), 2)
    if torch.version.hip is not None:
        # Capabilities are NVIDIA's numbers, and what follows from them NVIDIA's features.
        return Card((0, 0), torch.cuda.get_device_properties(device).multi_processor_count)
    properties = torch.cuda.get_device_properties(device)
    return Card((properties.major, properties.minor), properties.multi_processor_count)


def overlaps(card: Card) -> bool:
    """Whether a kernel can be launched while the one before it runs: programmatic dependent launch came with Hopper."""
    return card.capability >= (9, 0)


def overlapped(overlap: bool) -> dict[str, bool]:
    """The launch option of a kernel that may start before the previous one has finished."""
    return {"launch_pdl": True} if overlap else {}


def overlap_options(device: torch.device) -> dict[str, bool]:
    """What a kernel with a constant `overlap` takes to start while the one before it runs, where the card can."""
    overlap = overlaps(card_of(device))
    return {"overlap": overlap, **overlapped(overlap)}


def float32_precision(card: Card) -> str:
    """How kernels multiply float32 without losing any of it: in parts where tensor cores take them."""
    return "tf32x3" if card.capability >= (8, 0) else "ieee"
