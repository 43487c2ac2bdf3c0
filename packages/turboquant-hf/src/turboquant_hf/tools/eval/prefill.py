"""Fill several caches with one prompt."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from turboquant_hf._compat import Cache, DynamicCache, LinearAttentionLayer, PreTrainedConfig, with_cache


class _Shared(DynamicCache):
    """An uncompressed cache that hands the keys and values of a prompt on to others.

    A prompt attends on its own keys and values, whatever a cache keeps of them, so that one pass serves all.
    """

    def __init__(self, config: PreTrainedConfig, others: Iterable[Cache]) -> None:
        super().__init__(config=config)
        self._others = tuple(others)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values in every cache."""
        for other in self._others:
            other.update(key_states, value_states, layer_idx, *args, **kwargs)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


@torch.no_grad()
def fill(model: PreTrainedModel, input_ids: torch.Tensor, caches: Iterable[Cache]) -> None:
    """Put a prompt, int64 [batch_size, num_tokens], into empty caches, as a prefill of each would."""
    caches = tuple(caches)
    shared = _Shared(model.config, caches)
    if any(isinstance(layer, LinearAttentionLayer) for layer in shared.layers):
        # The states of linear attention do not go through `update`.
        for cache in caches:
            _prefill(model, input_ids, cache)
    else:
        _prefill(model, input_ids, shared)


def _prefill(model: PreTrainedModel, input_ids: torch.Tensor, cache: Cache) -> None:
    # Logits of a long prompt take more memory than its keys.
    model(input_ids=input_ids, **with_cache(cache), logits_to_keep=1)
