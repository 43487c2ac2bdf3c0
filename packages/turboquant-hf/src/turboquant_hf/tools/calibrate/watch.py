"""A cache that is looked at while a model fills it."""

from typing import Any

import torch
from transformers import DynamicCache


class WatchedCache(DynamicCache):
    """An uncompressed cache that shows the keys that it was given last, whatever its layers keep of them.

    Attributes:
        new_keys: Layer index to the keys of the last call, [batch_size, num_kv_heads, num_tokens, head_dim], as
            attention sees them. Layers that store no keys of their own, such as linear attention, are not in it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.new_keys: dict[int, torch.Tensor] = {}
        self._read: dict[int, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values."""
        self.new_keys[layer_idx] = key_states
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._read[layer_idx] = keys
        return keys, values

    def layer_of(self, keys: torch.Tensor) -> int | None:
        """The layer whose keys these are, as the cache gave them for the attention of this or of another layer."""
        return next((index for index, read in self._read.items() if read is keys), None)
