"""Caches that refuse what a call left half done."""

from functools import lru_cache
from typing import Any

import torch

from turboquant_hf._compat import Cache
from turboquant_hf.calls import CallGuard
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.layers.rows import picked, reordered, repeated


class GuardedCache(Cache):
    """A cache of which a `CallGuard` sees every call."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._calls = CallGuard()

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store keys and values of a layer's new tokens, and return what its attention reads.

        Raises:
            IndexError: If a static cache has no room for them; in a graph logits turn NaN instead.
            RuntimeError: If a call before stopped between layers and was not taken back, or another thread is inside.
        """
        if torch.compiler.is_compiling():
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._calls.enter(self.layers, layer_idx, key_states.shape[-2])
        read = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self._calls.leave()
        return read

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The convolution state of a linear-attention layer; see `Cache`."""
        self._reach_linear(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor | None:
        """The recurrent state of a linear-attention layer; see `Cache`."""
        self._reach_linear(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Replace the convolution state of a linear-attention layer; see `Cache`."""
        self._reach_linear(layer_idx, f"convolution {args} {kwargs}")
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Replace the recurrent state of a linear-attention layer; see `Cache`."""
        self._reach_linear(layer_idx, f"recurrence {args} {kwargs}")
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens; after a call that stopped between layers, all become as long.

        Raises:
            ValueError: If the argument is positive.
            RuntimeError: If a layer cannot take so many back, or has less than what is left.
        """
        self._calls.crop(self.layers, tokens_to_remove)

    def reset(self) -> None:
        """Forget everything."""
        self._calls.apply(self.layers, "reset")
        self._calls = CallGuard()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the sequences `beam_idx`, int64 [batch_size]."""
        reordered(beam_idx)
        self._calls.apply(self.layers, "reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        for batch_size in self._batch_sizes():
            repeated(batch_size, repeats)
        self._calls.apply(self.layers, "batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the sequences that `indices` picks of a tensor's first dimension: numbers, or a bool for each."""
        for batch_size in self._batch_sizes():
            picked(batch_size, indices)
        self._calls.apply(self.layers, "batch_select_indices", indices)

    def _batch_sizes(self) -> set[int]:
        """How many sequences compressed layers hold; what none of them takes is refused before any other changes."""
        compressed = (layer for layer in self.layers if isinstance(layer, TurboQuantLayer))
        return {layer.batch_size for layer in compressed if layer.is_initialized}

    def _reach_linear(self, layer_idx: int, replaced: str | None = None) -> None:
        if not torch.compiler.is_compiling():
            self._calls.reach_linear(self.layers, layer_idx, replaced)


def guard(cache: Cache) -> None:
    """Have a cache that is there already guarded from now on, and no other of its class."""
    cache.__class__ = _guarded_kind(type(cache))  # type: ignore[arg-type]
    cache._calls = CallGuard()


def unguard(cache: Cache) -> None:
    """Undo `guard`, if that was done.

    Raises:
        RuntimeError: If a call stopped between layers and was not taken back.
    """
    if isinstance(cache, GuardedCache):
        cache._calls.check(cache.layers)
        cache.__class__ = type(cache).__bases__[1]
        del cache._calls


@lru_cache
def _guarded_kind(kind: type[Cache]) -> type[GuardedCache]:
    return type(kind.__name__, (GuardedCache, kind), {"__module__": kind.__module__})
