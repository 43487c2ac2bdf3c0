"""What the codec covers, and the errors for what it does not."""

MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 512
MIN_BITS, MAX_BITS = 1, 8


def check_head_dim(head_dim: int) -> int:
    """Return `head_dim` when the codec covers it.

    Raises:
        ValueError: If it is not a multiple of 8 from 8 to 512.
    """
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM or head_dim % 8:
        raise ValueError(
            f"head_dim is {head_dim}; it must be a multiple of 8 from {MIN_HEAD_DIM} to "
            f"{MAX_HEAD_DIM}. Leave layers of another size uncompressed."
        )
    return head_dim


def check_bits(bits: float) -> int:
    """Return `bits` when codes of that width exist.

    Raises:
        ValueError: If it is no int from 1 to 8.
    """
    if not isinstance(bits, int) or bits not in range(MIN_BITS, MAX_BITS + 1):
        raise ValueError(f"bits is {bits}; codes have {MIN_BITS} to {MAX_BITS} whole bits")
    return bits
