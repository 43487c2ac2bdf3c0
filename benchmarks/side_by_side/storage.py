"""Bytes that a cache keeps, measured from its tensors' storage."""

from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import Cache, PreTrainedConfig

from side_by_side.caches import WINDOW, NewCache
from turboquant_core.quantized import storage_nbytes

# Less than a page of TurboQuantCache, so that its pages grow as they would token by token.
STEP = 8


def cache_nbytes(cache: Cache) -> int:
    """Allocated bytes of everything that a cache of any kind keeps."""
    return storage_nbytes(tensor for layer in cache.layers for tensor in _tensors(layer))


def bytes_per_token(filled: Cache, new_cache: NewCache, config: PreTrainedConfig) -> float:
    """Allocated bytes for each token when the model runs in bfloat16.

    A new cache gets the keys and values of a filled one: the last half window in small steps, as decoding would, so
    that a cache with a window is caught when that is half full; the rest at once.

    Args:
        filled: A DynamicCache that holds a text of more than half a window.
        new_cache: Makes the cache that is measured.
        config: The model's configuration.
    """
    cache = new_cache(config)
    num_tokens: int = filled.get_seq_length()
    starts = [0, *range(num_tokens - WINDOW // 2, num_tokens, STEP)]
    for layer_index, layer in enumerate(filled.layers):
        keys, values = layer.keys.bfloat16(), layer.values.bfloat16()
        for start, end in zip(starts, [*starts[1:], num_tokens], strict=True):
            cache.update(keys[:, :, start:end].clone(), values[:, :, start:end].clone(), layer_index)
    return cache_nbytes(cache) / num_tokens


def _tensors(item: object) -> Iterator[torch.Tensor]:
    """Plain tensors reachable from attributes, containers and tensor subclasses that wrap others."""
    if isinstance(item, torch.Tensor):
        if is_traceable_wrapper_subclass(item):
            for name in item.__tensor_flatten__()[0]:
                yield from _tensors(getattr(item, name))
        else:
            yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from _tensors(value)
    elif isinstance(item, list | tuple):
        for value in item:
            yield from _tensors(value)
    elif hasattr(item, "__dict__") and not isinstance(item, type | torch.dtype):
        yield from _tensors(vars(item))
