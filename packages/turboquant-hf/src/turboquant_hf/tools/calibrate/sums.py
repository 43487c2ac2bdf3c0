"""Sums over tokens of what keys and queries of a layer are like."""

import torch


class Sums:
    """Sums over the keys of a layer and the queries that read them, of each KV head and channel, float64 on the CPU.

    Energies are means by how much a pair of a query and a key counts.
    """

    def __init__(self) -> None:
        self._num_keys = 0
        self._keys: torch.Tensor | int = 0
        self._key_weights: torch.Tensor | int = 0
        self._weighted_keys: torch.Tensor | int = 0
        self._weighted_key_squares: torch.Tensor | int = 0
        self._query_weights: torch.Tensor | int = 0
        self._weighted_query_squares: torch.Tensor | int = 0

    def add_keys(self, keys: torch.Tensor) -> None:
        """Add keys [num_kv_heads, num_tokens, head_dim] to the mean."""
        self._keys = self._keys + keys.cpu().double().sum(1)
        self._num_keys += keys.shape[1]

    def add_pairs(self, queries: torch.Tensor, keys: torch.Tensor, weights: torch.Tensor) -> None:
        """Add pairs of queries and keys.

        Args:
            queries: [num_kv_heads, num_queries, head_dim], those of all query heads of a KV head.
            keys: [num_kv_heads, num_keys, head_dim].
            weights: How much each pair counts, [num_kv_heads, num_queries, num_keys].
        """
        of_keys, of_queries = (weights.sum(dim).double().cpu()[..., None] for dim in (1, 2))
        # A mean may be a hundred times what keys differ by.
        keys, queries = keys.cpu().double(), queries.cpu().double()
        self._key_weights = self._key_weights + of_keys.sum(1)
        self._weighted_keys = self._weighted_keys + (of_keys * keys).sum(1)
        self._weighted_key_squares = self._weighted_key_squares + (of_keys * keys.square()).sum(1)
        self._query_weights = self._query_weights + of_queries.sum(1)
        self._weighted_query_squares = self._weighted_query_squares + (of_queries * queries.square()).sum(1)

    @property
    def mean_key(self) -> torch.Tensor:
        """The mean key [num_kv_heads, head_dim], in which all keys count alike."""
        return torch.as_tensor(self._keys / self._num_keys)

    @property
    def energies(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean squares of keys less the mean key, and of queries, [num_kv_heads, head_dim]; zeros where none counts."""
        mean = self.mean_key
        squares = self._weighted_key_squares - 2 * mean * self._weighted_keys + mean.square() * self._key_weights
        return _mean(squares, self._key_weights, mean), _mean(self._weighted_query_squares, self._query_weights, mean)


def _mean(total: torch.Tensor | int, weights: torch.Tensor | int, like: torch.Tensor) -> torch.Tensor:
    total, weights = (torch.as_tensor(x).to(like) for x in (total, weights))
    return torch.where(weights > 0, total / weights, total).clamp(min=0).expand_as(like)
