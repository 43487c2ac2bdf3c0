"""Which bits every layer gets: the least sum of costs under a budget, exactly."""

import math
from collections.abc import Mapping, Sequence

import torch


def allocate(costs: Sequence[Mapping[int, float]], sizes: Sequence[int], budget: int) -> list[int]:
    """Choose bits for each of several vectors so that their costs add up to the least.

    A knapsack with one choice for each vector, solved by dynamic programming over bytes.

    Args:
        costs: Bits to cost, for each vector.
        sizes: Bytes of one bit, for each vector.
        budget: Bytes of all at most.

    Returns:
        The bits of each; of equal costs the fewest.

    Raises:
        ValueError: If the fewest bits of all take more than the budget.
    """
    unit = math.gcd(*sizes)
    capacity = budget // unit
    best = torch.full((capacity + 1,), torch.inf, dtype=torch.float64)
    best[0] = 0
    chosen = []
    for cost, size in zip(costs, sizes, strict=True):
        widths = sorted(cost)
        options = torch.full((len(widths), capacity + 1), torch.inf, dtype=torch.float64)
        for option, bits in zip(options, widths, strict=True):
            taken = bits * size // unit
            if taken <= capacity:
                option[taken:] = best[: capacity + 1 - taken] + cost[bits]
        best, index = options.min(dim=0)
        chosen.append((widths, index, size // unit))
    if best.isinf().all():
        least = sum(min(cost) * size for cost, size in zip(costs, sizes, strict=True))
        raise ValueError(f"the budget is {budget} bytes; the fewest bits of all take {least}")
    held = int(best.argmin())
    found = []
    for widths, index, size in reversed(chosen):
        found.append(widths[index[held]])
        held -= found[-1] * size
    return found[::-1]
