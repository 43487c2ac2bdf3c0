"""The widths of codes that fragments look up: all that the path knows of one is here."""

from dataclasses import dataclass

# Tokens of a tensor-core tile.
SUBTILE = 16


@dataclass(frozen=True)
class Width:
    """How codes of one width come through shared memory and become centroids.

    Attributes:
        streams: Bits of every code in each stream, which is a plane of the packing or one half of the plane of 8 bits.
        coefficients: Of the polynomial that gives centroids; 0 for a byte permute. Errors are 0.0015 to 0.0033 of a
            standard deviation: rounding centroids to bfloat16 costs 0.0016, and the other roundings of a bfloat16
            attention more. At 8 bits a seventh would take 4 % longer.
    """

    streams: tuple[int, ...]
    coefficients: int = 0


WIDTHS = {
    2: Width((2,)),
    3: Width((2, 1)),
    4: Width((4,)),
    5: Width((4, 1), 5),
    6: Width((4, 2), 6),
    8: Width((4, 4), 6),
}
