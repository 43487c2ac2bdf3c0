"""A scale and an order of the channels of keys, from what keys and queries are like: the same at every position.

A score q·k is a sum over channels, and an error in channel c of a stored key costs what queries have there. With
scale s, errors spread evenly over the stored channels s_c k_c are divided by s_c when a key is read. The sum of what
channels cost is least where s_c² K_c and Q_c / s_c² are alike: s_c = (Q_c / K_c)^(1/4), with the mean squares K of
centred keys and Q of queries. What is left then costs √(K_c Q_c).

A rotary embedding turns a pair of channels by an angle that grows with the position. What treats both channels of a
pair alike commutes with it. So K and Q are those of a pair, which no rotation changes, and statistics of some
positions serve all.
"""

import torch

from turboquant_core.key_transform import KeyTransform

RIDGE = 1e-3
"""What the mean over channels adds to the energy of each: without it a channel with no energy has no scale."""


def pair_transform(
    mean: torch.Tensor | None, key_energy: torch.Tensor, query_energy: torch.Tensor, pairs: torch.Tensor
) -> KeyTransform:
    """The transform with the scale and the order of these statistics.

    A head that `unusable_heads` names has a scale of ones, and pairs as they come.

    Args:
        mean: float32 [num_kv_heads, head_dim], what keys are stored less of, or None.
        key_energy: [num_kv_heads, head_dim], mean squares of keys less their mean, after the rotary embedding. Keys may
            count by how much an error in them does.
        query_energy: The same shape, mean squares of the queries that read them.
        pairs: int64 [head_dim], which rotary pair each channel is of, any number that is the same for both and for no
            other; one of its own for a channel that is not rotated.

    Returns:
        A scale whose geometric mean is 1 in each head, and an order by what channels cost, the dearest first. Channels
        of a pair lie together, and in one half of the channels.
    """
    _, pair_of, sizes = torch.unique(pairs.cpu(), return_inverse=True, return_counts=True)
    keys, queries = (_pair_energy(x, pair_of, sizes) for x in (key_energy, query_energy))
    scale = (queries / keys)[:, pair_of] ** 0.25
    scale, costs = scale / scale.log().mean(-1, keepdim=True).exp(), keys * queries
    for head in unusable_heads(key_energy, query_energy):
        scale[head], costs[head] = 1, 1
    order = torch.stack([_dearest_first(cost, pair_of) for cost in costs])
    return KeyTransform(mean, scale.float(), order)


def unusable_heads(key_energy: torch.Tensor, query_energy: torch.Tensor) -> dict[int, str]:
    """The heads whose energies [num_kv_heads, head_dim] say nothing of a scale, and why."""
    found = {}
    for head, (keys, queries) in enumerate(zip(key_energy, query_energy, strict=True)):
        if not bool((keys.isfinite() & queries.isfinite()).all()):
            found[head] = "its keys or queries are not finite"
        elif not bool((queries > 0).any()):
            found[head] = "no query reads it"
        elif not bool((keys > 0).any()):
            found[head] = "its keys are all alike"
    return found


def _pair_energy(energy: torch.Tensor, pair_of: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Of a channel of each pair, float64 [num_kv_heads, num_pairs] on the CPU."""
    energy = energy.cpu().double()
    energy = (1 - RIDGE) * energy + RIDGE * energy.mean(-1, keepdim=True)
    total = energy.new_zeros(len(energy), len(sizes))
    return total.index_add_(-1, pair_of, energy) / sizes


def _dearest_first(cost: torch.Tensor, pair_of: torch.Tensor) -> torch.Tensor:
    """The channels of the dearest pairs that fill a half, then all others."""
    half: list[int] = []
    others: list[int] = []
    for pair in cost.argsort(descending=True, stable=True):
        channels = (pair_of == pair).nonzero().flatten().tolist()
        # Where room for one channel is left, the next that is not rotated takes it.
        fits = len(half) + len(channels) <= len(pair_of) // 2
        (half if fits else others).extend(channels)
    return torch.tensor(half + others)
