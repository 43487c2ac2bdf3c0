"""The widths of codes that fragments look up: all that the path knows of one is here."""

# Tokens of a tensor-core tile.
SUBTILE = 16
STREAMS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (4, 4)}
"""By width, the bits of a code in each stream through shared memory: a plane of the packing, or half that of 8 bits."""
