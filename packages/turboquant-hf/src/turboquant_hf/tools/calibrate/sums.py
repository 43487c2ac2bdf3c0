"""Sums over tokens of what keys and queries of a layer are like."""

import torch


class Sums:
    """Sums over the keys of a layer and the queries that read them, of each KV head and channel, float64 on the CPU."""

    def __init__(self) -> None:
        self._num_keys = self._num_queries = 0
        self._keys: torch.Tensor | int = 0
        self._key_squares: torch.Tensor | int = 0
        self._query_squares: torch.Tensor | int = 0

    def add_keys(self, keys: torch.Tensor) -> None:
        """Add keys [num_kv_heads, num_tokens, head_dim]."""
        # A mean may be a hundred times what keys differ by.
        keys = keys.cpu().double()
        self._keys = self._keys + keys.sum(1)
        self._key_squares = self._key_squares + keys.square().sum(1)
        self._num_keys += keys.shape[1]

    def add_queries(self, queries: torch.Tensor) -> None:
        """Add queries [num_kv_heads, any, head_dim], those of all query heads of a KV head."""
        self._query_squares = self._query_squares + queries.float().square().sum(1).cpu().double()
        self._num_queries += queries.shape[1]

    @property
    def mean_key(self) -> torch.Tensor:
        """The mean key [num_kv_heads, head_dim]."""
        return torch.as_tensor(self._keys / self._num_keys)

    @property
    def key_energy(self) -> torch.Tensor:
        """Mean squares of keys less their mean, [num_kv_heads, head_dim]."""
        return torch.as_tensor(self._key_squares / self._num_keys - self.mean_key.square()).clamp(min=0)

    @property
    def query_energy(self) -> torch.Tensor:
        """Mean squares of queries, [num_kv_heads, head_dim]; zeros if none reads the layer."""
        if not self._num_queries:
            return torch.zeros_like(self.mean_key)
        return torch.as_tensor(self._query_squares / self._num_queries)
