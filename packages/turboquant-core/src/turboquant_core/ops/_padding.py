"""How sizes are padded for kernels."""

# tl.dot takes no sum over fewer than 16 numbers, and none over fewer than 32 of eight bits.
MIN_OCTET = 4


def padded_octet(head_dim: int) -> int:
    """Eighths of the channels, padded to a power of two: the padded head_dim is eight times that."""
    return max(MIN_OCTET, power_of_two(head_dim // 8))


def power_of_two(number: int) -> int:
    """The least that is no less; Triton's own function, one of its compiler, takes the host many times as long."""
    return 1 << (number - 1).bit_length()
