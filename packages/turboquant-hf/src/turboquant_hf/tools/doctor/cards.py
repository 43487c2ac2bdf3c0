"""Cards by name."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """An NVIDIA card.

    Attributes:
        name: What `--gpu` takes.
        memory_gib: GiB that CUDA reports, which is less than the memory that is sold.
        capability: Compute capability.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]


CARDS = (
    Card("B200", 178.35, (10, 0)),
    Card("H200", 139.80, (9, 0)),
    Card("H100", 79.18, (9, 0)),
    Card("H100-NVL", 93.09, (9, 0)),
    Card("H20", 95.00, (9, 0)),
    Card("A100-80GB", 79.25, (8, 0)),
    Card("A100-40GB", 39.49, (8, 0)),
    Card("L40S", 44.39, (8, 9)),
    Card("L4", 22.03, (8, 9)),
    Card("A10G", 22.06, (8, 6)),
    Card("RTX-PRO-6000", 94.97, (12, 0)),
    Card("RTX-6000-Ada", 47.37, (8, 9)),
    Card("RTX-A6000", 47.40, (8, 6)),
    Card("RTX-5090", 31.36, (12, 0)),
    Card("RTX-4090", 23.52, (8, 9)),
    Card("RTX-3090", 23.56, (8, 6)),
    Card("T4", 14.56, (7, 5)),
)


def find_card(name: str) -> Card:
    """The card of a name, in any case and with spaces or hyphens.

    Raises:
        ValueError: If it is not known.
    """
    for card in CARDS:
        if card.name.lower() == name.strip().lower().replace(" ", "-"):
            return card
    known = ", ".join(card.name for card in CARDS)
    raise ValueError(f"GPU {name!r} is not known; known are {known}. For another give its memory with --memory GiB.")
