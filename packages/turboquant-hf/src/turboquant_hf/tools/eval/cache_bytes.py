"""Bytes that a cache keeps, measured from its tensors' storage."""

from collections.abc import Iterator

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from turboquant_core.quantized import storage_nbytes
from turboquant_hf._compat import Cache
from turboquant_hf.tools.caches import WINDOW

# Less than a page of TurboQuantCache, so that its pages grow as they would token by token.
STEP = 8


def cache_nbytes(cache: Cache) -> int:
    """Allocated bytes of everything that a cache of any kind keeps."""
    return storage_nbytes(tensor for layer in cache.layers for tensor in _tensors(layer))


def bytes_per_token(filled: Cache, empty: Cache, num_tokens: int) -> float:
    """Allocated bytes for each token when the model runs in bfloat16.

    An empty cache gets the keys and values of a filled one: the last half window in small steps, as decoding would, so
    that a cache with a window is caught when that is half full; the rest at once. Layers that keep a state instead of
    keys and values have no bytes per token and are left out.

    Args:
        filled: A DynamicCache that holds a text of more than half a window.
        empty: The cache that is measured.
        num_tokens: Tokens of the text.
    """
    for layer_index, layer in enumerate(filled.layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if keys is None or values is None or keys.ndim != 4:
            continue
        keys, values = keys.bfloat16(), values.bfloat16()
        held = keys.shape[-2]
        starts = [0, *range(max(STEP, held - WINDOW // 2), held, STEP)]
        for start, end in zip(starts, [*starts[1:], held], strict=True):
            # Of a layer, not of the cache, whose calls reach all layers in turn.
            empty.layers[layer_index].update(keys[:, :, start:end].clone(), values[:, :, start:end].clone())
    return cache_nbytes(empty) / num_tokens


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
