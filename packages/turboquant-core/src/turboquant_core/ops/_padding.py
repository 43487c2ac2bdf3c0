"""How rows of channels are padded for kernels."""

# tl.dot takes no sum over fewer than 16 numbers, and none over fewer than 32 of eight bits.
MIN_OCTET = 4


def padded_octet(head_dim: int) -> int:
    """Eighths of the channels, padded to a power of two: the padded head_dim is eight times that."""
    return max(MIN_OCTET, 1 << (head_dim // 8 - 1).bit_length())
