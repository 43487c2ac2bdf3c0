"""Tokens that are kept in the model's own type beside the codes: the first of every row, and the newest."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch

from turboquant_core.ops.decode_attention import MAX_QUERY_LEN
from turboquant_hf.storage.tables import kept_bias, kept_indices, kept_slots


@dataclass(frozen=True)
class KeptCall:
    """What attention reads of the kept tokens in one call.

    Attributes:
        keys: [batch_size, num_kv_heads, num_kept, head_dim], in no order.
        values: The same for values.
        bias: float32 [1 or batch_size, query_len, num_kept]: 0 where a token sees a kept one, else minus infinity.
    """

    keys: torch.Tensor
    values: torch.Tensor
    bias: torch.Tensor


class KeptTokens:
    """Keys and values of the first `sink_tokens` tokens and of a window of the newest, as the model made them.

    A token sees the sinks and the newest `recent_tokens` tokens, itself included, as they are, and the rest as codes.
    All tokens have codes too: one that leaves the window is read from them from then on, and nothing is moved.

    The window is a ring with room for `MAX_QUERY_LEN` tokens more, so that a call of as many tokens finds what its
    first one sees, and that as many can be taken back.

    Args:
        sink_tokens: First tokens that are kept.
        recent_tokens: Newest tokens that are kept.
        keys: [batch_size, num_kv_heads, sink_tokens + ring_size + 1, head_dim]: the sinks, the ring, and a slot that
            nobody reads for what is not kept.
        values: The same for values.

    Attributes:
        held_from: The first position that the ring holds.
        row_starts: int32 [batch_size], the first token of every row that is no padding: sinks begin there, and nothing
            before is seen. None where no row is padded. Layers share it and what is made of it, so that only a static
            cache, which has its own, writes it in place.
    """

    def __init__(self, sink_tokens: int, recent_tokens: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens
        self.keys = keys
        self.values = values
        self.held_from = sink_tokens
        self.row_starts: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, sink_tokens: int, recent_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device
    ) -> "KeptTokens":
        """Room for the tokens of (batch_size, num_kv_heads, head_dim)."""
        batch_size, num_kv_heads, head_dim = heads
        shape = (batch_size, num_kv_heads, sink_tokens + ring_size_of(recent_tokens) + 1, head_dim)
        # Zeroed: what nobody has written is multiplied with a weight of zero.
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return cls(sink_tokens, recent_tokens, keys, values)

    @property
    def ring_size(self) -> int:
        """Tokens that the ring has room for."""
        return ring_size_of(self.recent_tokens)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        return [self.keys, self.values, *([] if self.row_starts is None else [self.row_starts])]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "KeptTokens":
        """The same with `function`, a choice of rows or a move, applied to every tensor."""
        mapped = copy(self)
        mapped.keys, mapped.values = function(self.keys), function(self.values)
        mapped.row_starts = None if self.row_starts is None else function(self.row_starts)
        return mapped

    def write(self, keys: torch.Tensor, values: torch.Tensor, start: int | torch.Tensor) -> None:
        """Keep what is to be kept of keys and values [batch_size, num_kv_heads, num_new, head_dim].

        Args:
            keys: New keys.
            values: New values.
            start: Position of the first of them, an int or int64 [].
        """
        num_new = keys.shape[2]
        if isinstance(start, int):
            if start >= self.sink_tokens and not self.ring_size and self.row_starts is None:
                return
            self.held_from = max(self.held_from, start + num_new - self.ring_size)
        slots = kept_slots(start, num_new, self.sink_tokens, self.ring_size, self.row_starts, keys.device)
        for kept, new in ((self.keys, keys.detach()), (self.values, values.detach())):
            if self.row_starts is not None:
                kept.scatter_(2, slots[:, None, :, None].expand_as(new), new)
                continue
            if len(slots) < num_new:
                new = new.index_select(2, kept_indices(num_new, self.sink_tokens, self.ring_size, new.device))
            kept.index_copy_(2, slots, new)

    @property
    def sinks_end(self) -> int | torch.Tensor:
        """The first position after the sinks, an int or int32 [batch_size]."""
        return self.sink_tokens if self.row_starts is None else self.row_starts + self.sink_tokens

    def with_sinks(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all positions, [batch_size, num_kv_heads, num_tokens, head_dim], with sinks as they are.

        Written in place where rows begin with their first token.
        """
        if self.row_starts is None:
            sinks = min(self.sink_tokens, keys.shape[2])
            keys[:, :, :sinks], values[:, :, :sinks] = self.keys[:, :, :sinks], self.values[:, :, :sinks]
            return keys, values
        slots = torch.arange(keys.shape[2], device=keys.device) - self.row_starts[:, None]
        is_sink = ((slots >= 0) & (slots < self.sink_tokens))[:, None, :, None]
        slots = slots.clamp(0, self.sink_tokens - 1)[:, None, :, None]
        keys, values = (
            torch.where(is_sink, held.take_along_dim(slots, dim=2), states)
            for held, states in ((self.keys, keys), (self.values, values))
        )
        return keys, values

    def first_held(self, num_tokens: int) -> int:
        """The first position of `num_tokens` that the ring holds; num_tokens where it holds none."""
        return min(max(self.sink_tokens, self.held_from), num_tokens) if self.ring_size else num_tokens

    def in_order(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the sinks, and of what the ring holds of `num_tokens` tokens."""
        recent = self.recent(self.first_held(num_tokens), num_tokens)
        num_sinks = min(self.sink_tokens, num_tokens)
        keys, values = (
            torch.cat([states[:, :, :num_sinks], newest], dim=2)
            for states, newest in zip((self.keys, self.values), recent, strict=True)
        )
        return keys, values

    def restore(self, keys: torch.Tensor, values: torch.Tensor, num_tokens: int) -> None:
        """Take what `in_order` gave."""
        num_sinks = min(self.sink_tokens, num_tokens)
        self.held_from = max(self.sink_tokens, num_tokens - (keys.shape[2] - num_sinks))
        for kept, states in ((self.keys, keys), (self.values, values)):
            kept[:, :, :num_sinks] = states[:, :, :num_sinks]
        self.put_back(keys[:, :, num_sinks:], values[:, :, num_sinks:], self.held_from)

    def put_back(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Put keys and values of positions from `start` on into the ring, in place of tokens that were taken back."""
        slots = self._ring_slots(start, start + keys.shape[2])
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept.index_copy_(2, slots, new)

    def recent(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the positions start to stop - 1, which the ring has."""
        slots = self._ring_slots(start, stop)
        return self.keys.index_select(2, slots), self.values.index_select(2, slots)

    def call(
        self, length: int | torch.Tensor, query_len: int, starts: torch.Tensor | None, window: int | None
    ) -> KeptCall:
        """What the last `query_len` of `length` tokens read.

        Args:
            length: Tokens of a row, those of the call included, an int or int64 [].
            query_len: Tokens of the call.
            starts: int32 [batch_size], the first token of every row that may be seen; None for the first.
            window: Tokens that a token sees, itself included; None for all.
        """
        sizes = (self.sink_tokens, self.recent_tokens, self.ring_size)
        bias = kept_bias(length, query_len, *sizes, window, starts, self.row_starts, self.keys.device)
        return KeptCall(self.keys, self.values, bias)

    def _ring_slots(self, start: int, stop: int) -> torch.Tensor:
        return torch.arange(start, stop, device=self.keys.device) % max(1, self.ring_size) + self.sink_tokens


def ring_size_of(recent_tokens: int) -> int:
    """Tokens that the ring of a window has room for."""
    return recent_tokens + MAX_QUERY_LEN if recent_tokens else 0
