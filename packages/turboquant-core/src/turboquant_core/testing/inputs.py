"""Vectors to quantise: the easy kind, and the kinds that a weak rotation fails on.

Every function returns float32 [num_vectors, head_dim] from a torch generator of its own. The codec
draws its rotations from SHAKE-256, so no seed here can reproduce one of them.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch

InputKind = Callable[[int, int, int], torch.Tensor]


def gaussian(num_vectors: int, head_dim: int, seed: int) -> torch.Tensor:
    """Independent standard normal coordinates."""
    return torch.randn(num_vectors, head_dim, generator=_generator(seed))


def one_hot(num_vectors: int, head_dim: int, seed: int) -> torch.Tensor:
    """One coordinate of ±1, at a random place."""
    return _spikes(1, num_vectors, head_dim, seed)


def two_hot(num_vectors: int, head_dim: int, seed: int) -> torch.Tensor:
    """Two coordinates of ±1, at random places."""
    return _spikes(2, num_vectors, head_dim, seed)


def equal_magnitude(num_vectors: int, head_dim: int, seed: int) -> torch.Tensor:
    """Every coordinate ±1."""
    return _signs((num_vectors, head_dim), _generator(seed))


def heavy_tailed(num_vectors: int, head_dim: int, seed: int) -> torch.Tensor:
    """Independent coordinates of Student's t with 2 degrees of freedom: infinite variance."""
    generator = _generator(seed)
    normal = torch.randn(num_vectors, head_dim, generator=generator)
    # Half a chi-square variable with 2 degrees of freedom is a standard exponential one.
    return normal / torch.empty_like(normal).exponential_(generator=generator).sqrt()


INPUT_KINDS: Mapping[str, InputKind] = MappingProxyType(
    {
        "gaussian": gaussian,
        "one_hot": one_hot,
        "two_hot": two_hot,
        "equal_magnitude": equal_magnitude,
        "heavy_tailed": heavy_tailed,
    }
)
"""Name to generator."""


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return 2.0 * torch.randint(2, shape, generator=generator) - 1.0


def _spikes(count: int, num_vectors: int, head_dim: int, seed: int) -> torch.Tensor:
    generator = _generator(seed)
    places = torch.rand(num_vectors, head_dim, generator=generator).topk(count).indices
    return torch.zeros(num_vectors, head_dim).scatter(-1, places, _signs((num_vectors, count), generator))
