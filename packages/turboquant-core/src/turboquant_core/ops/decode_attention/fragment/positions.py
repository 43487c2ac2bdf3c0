"""Which channel every position of an operand is."""

from turboquant_core.ops.decode_attention.fragment.lookup import Numbers, value_lookup


def key_channels(head_dim: int, numbers: Numbers) -> tuple[int, ...]:
    """The channels of the operand of keys, or of one of their halves, in the order of its positions."""
    order, words = numbers.order, head_dim // 8
    return tuple(
        _channel(head_dim, lane * (words // 4) + inner, order[4 * half + code])
        for inner in range(words // 4)
        for half in range(2)
        for lane in range(4)
        for code in range(4)
    )


def value_channels(head_dim: int, bits: int) -> tuple[int, ...]:
    """The channels of the operand of values, and so of partial results, in the order of its positions."""
    order, words = value_lookup(head_dim, bits).groups[0].order, head_dim // 8
    return tuple(
        _channel(head_dim, lane * (words // 8) + inner, order[place])
        for inner in range(words // 8)
        for place in range(8)
        for lane in range(8)
    )


def bit_swaps(channels: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Pairs of bits of a channel that have to change places, one pair after the other, for this order of channels."""
    order = list(range(len(channels).bit_length() - 1))
    swaps = []
    for bit in order.copy():
        other = order.index(channels[1 << bit].bit_length() - 1)
        if other != bit:
            order[bit], order[other] = order[other], order[bit]
            swaps.append((bit, other))
    return tuple(swaps)


def _channel(head_dim: int, word: int, code: int) -> int:
    return 4 * word + code // 2 + code % 2 * (head_dim // 2)
