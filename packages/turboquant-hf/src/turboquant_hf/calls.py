"""Caches that refuse what a call left half done: a call reaches every layer, one at a time."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import get_ident
from typing import Any

import torch

from turboquant_hf._compat import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin, forget_tokens
from turboquant_hf.layers.cross import CrossAttentionLayer
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.layers.rows import picked, reordered, repeated
from turboquant_hf.layers.static import TurboQuantStaticLayer

RESET = "reset() forgets everything."


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
        for layer in self.layers:
            if not isinstance(layer, TurboQuantLayer):
                forget_tokens(layer)
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


class CallGuard:
    """Finds calls that did not reach every layer, and threads that use one cache at once.

    A forward pass gives the layers their tokens in turn. One that stops between them leaves layers of different
    length, and positions and masks of a later one would fit some of them. What runs in a graph is not seen.
    """

    def __init__(self) -> None:
        # Of the call at work, or of the last one: its attention layers, its linear ones, what it replaced of these.
        self._attended: set[int] = set()
        self._linear: set[int] = set()
        self._replaced: set[tuple[int, str]] = set()
        self._last = -1
        self._continues = False
        self._half_done: str | None = None
        # The thread inside a layer. `dict.setdefault` is one step for all threads, and takes no lock.
        self._inside: dict[str, int] = {}

    def enter(self, layers: Sequence[Any], index: int, num_new: int) -> None:
        """Before an attention layer stores `num_new` tokens.

        Raises:
            IndexError: If a static layer has no room for them.
            RuntimeError: If layers do not agree, or another thread is inside.
        """
        this_thread = get_ident()
        if self._inside.setdefault("thread", this_thread) != this_thread:
            raise RuntimeError(
                "another thread is inside this cache, or was interrupted there. A cache serves one call at a time: "
                f"give every thread its own. {RESET}"
            )
        try:
            if index < self._last or index in self._attended:
                self._check_linear(layers)
                self._check_attention(layers, index, num_new)
                self._forget_call()
            elif not self._attended:
                self._check_attention(layers, index, num_new)
            elif self._continues and (index >= len(layers) or not layers[index].is_initialized):
                # The very first call did not reach it.
                raise RuntimeError(_disagreement(layers, {**attention_lengths(layers), index: 0}))
        except BaseException:
            self._inside.clear()
            raise
        self._attended.add(index)
        self._last = index

    def leave(self) -> None:
        """After a layer has stored its tokens."""
        self._inside.clear()

    def reach_linear(self, layers: Sequence[Any], index: int, replaced: str | None) -> None:
        """Before a linear-attention layer is read, or a state of it replaced.

        Raises:
            RuntimeError: If the call before did not reach every layer.
        """
        if index < self._last or (index, replaced) in self._replaced:
            self._check_linear(layers)
            self._forget_call()
        if replaced is not None:
            self._replaced.add((index, replaced))
        self._linear.add(index)
        self._last = index

    def check(self, layers: Sequence[Any]) -> None:
        """Compare the layers.

        Raises:
            RuntimeError: If they do not agree.
        """
        lengths = attention_lengths(layers)
        self._check(layers, lengths, max(lengths.values(), default=0))

    def apply(self, layers: Sequence[Any], operation: str, *arguments: object) -> None:
        """Call a method of every layer. Where that stops between them, the cache serves nothing before `reset`."""
        self._for_each(layers, operation, lambda layer: getattr(layer, operation)(*arguments))

    def crop(self, layers: Sequence[Any], tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of the longest layer, and leave all others as long.

        Raises:
            ValueError: If the argument is positive.
            RuntimeError: If a layer has less than what is left.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop got {tokens_to_remove}; pass the number of tokens to remove as a negative number")
        for index, layer in enumerate(layers):
            if not hasattr(layer, "crop"):
                raise RuntimeError(f"layer {index} is a {type(layer).__name__}, which takes no token back. {RESET}")
        self._check_linear(layers)
        lengths = attention_lengths(layers)
        longest, shortest = max(lengths.values(), default=0), min(lengths.values(), default=0)
        remaining = max(0, longest + tokens_to_remove)
        if longest != shortest and (remaining > shortest or any(map(_is_linear, layers))):
            raise RuntimeError(_disagreement(layers, lengths))
        surplus = {id(layers[index]): remaining - length for index, length in lengths.items()}
        # Those that may refuse come first.
        in_turn = sorted(layers, key=lambda layer: not (_is_linear(layer) or getattr(layer, "is_sliding", False)))
        self._for_each(in_turn, "crop", lambda layer: layer.crop(surplus.get(id(layer), tokens_to_remove)))
        self._forget_call()

    def _for_each(self, layers: Sequence[Any], name: str, change: Callable[[Any], None]) -> None:
        done = 0
        try:
            for layer in layers:
                change(layer)
                done += 1
        finally:
            if 0 < done < len(layers):
                self._half_done = name

    def _check_attention(self, layers: Sequence[Any], index: int, num_new: int) -> None:
        """Before the first attention layer that a call reaches."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        lengths = attention_lengths(layers)
        num_tokens = lengths.get(index, 0)
        self._check(layers, lengths, num_tokens)
        _check_room(layers, num_tokens, num_new)
        self._continues = num_tokens > 0

    def _check(self, layers: Sequence[Any], lengths: dict[int, int], num_tokens: int) -> None:
        if self._half_done is not None:
            raise RuntimeError(f"{self._half_done} stopped between the layers of this cache. {RESET}")
        if any(length != num_tokens for length in lengths.values()):
            raise RuntimeError(_disagreement(layers, lengths))

    def _check_linear(self, layers: Sequence[Any]) -> None:
        """Find out whether the last call reached all layers: linear ones cannot tell how far they are."""
        if self._linear and (self._linear, self._attended) != (
            {index for index, layer in enumerate(layers) if _is_linear(layer)},
            {index for index, layer in enumerate(layers) if isinstance(layer, CacheLayerMixin)},
        ):
            raise RuntimeError(
                "a call stopped between the layers of this cache, and linear-attention layers take no token back. "
                f"{RESET}"
            )

    def _forget_call(self) -> None:
        self._attended.clear()
        self._linear.clear()
        self._replaced.clear()
        self._last = -1


def attention_lengths(layers: Sequence[Any]) -> dict[int, int]:
    """Tokens of every attention layer that has been used, by index; waits for the device where it alone knows."""
    lengths = {
        index: layer.get_seq_length()
        for index, layer in enumerate(layers)
        if isinstance(layer, CacheLayerMixin) and layer.is_initialized and not isinstance(layer, CrossAttentionLayer)
    }
    on_device = {index: length for index, length in lengths.items() if isinstance(length, torch.Tensor)}
    if on_device:
        lengths |= zip(on_device, torch.stack(list(on_device.values())).tolist(), strict=True)
    return lengths


def _is_linear(layer: object) -> bool:
    return isinstance(layer, LinearAttentionCacheLayerMixin)


def _check_room(layers: Sequence[Any], num_tokens: int, num_new: int) -> None:
    for layer in layers:
        if isinstance(layer, TurboQuantStaticLayer) and num_tokens + num_new > layer.get_max_length():
            raise IndexError(
                f"this cache holds {num_tokens} tokens and {num_new} more come, and it was made for "
                f"max_length={layer.get_max_length()}. Make one with a larger max_length; crop(-n) takes back the last "
                f"n, and {RESET}"
            )


def _disagreement(layers: Sequence[Any], lengths: dict[int, int]) -> str:
    held = [length for _, length in sorted(lengths.items())]
    can_crop = min(held) and not any(map(_is_linear, layers))
    back = f"crop({min(held) - max(held)}) takes back what not all have, and " if can_crop else ""
    return (
        f"the layers of this cache hold {held} tokens: a call stopped between them, or another thread is in the middle "
        f"of one. {back}{RESET}"
    )
