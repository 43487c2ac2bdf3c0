"""Tokens that are stored in the model's own type beside the codes: the first of every row, and the newest."""

from collections.abc import Callable
from copy import copy
from typing import Self

import torch

from turboquant_hf.storage.tables import FullPrecisionSizes, Written


class FullPrecision:
    """Keys and values of the first tokens and of a window of the newest, as the model made them.

    A token sees the first tokens and the newest, itself included, as they are, and the rest as codes. All tokens have
    codes too: one that leaves the window is read from them from then on, and nothing is moved. The window is a ring,
    of which `Length` knows what it holds.

    Args:
        sizes: How many tokens there are.
        keys: [batch_size, num_kv_heads, first + ring + 1, head_dim]: the first tokens, the ring, and a place that
            nobody reads for what is not kept.
        values: The same for values, of their head_dim.
    """

    def __init__(self, sizes: FullPrecisionSizes, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.sizes = sizes
        self.keys = keys
        self.values = values

    @classmethod
    def empty(
        cls,
        sizes: FullPrecisionSizes,
        heads: tuple[int, int],
        head_dims: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> Self:
        """Room for the tokens of (batch_size, num_kv_heads), whose keys and values have these head_dims."""
        # Zeroed: what nobody has written is multiplied with a weight of zero.
        keys, values = (
            torch.zeros(*heads, sizes.first + sizes.ring + 1, head_dim, dtype=dtype, device=device)
            for head_dim in head_dims
        )
        return cls(sizes, keys, values)

    @classmethod
    def restored(
        cls, sizes: FullPrecisionSizes, keys: torch.Tensor, values: torch.Tensor, num_first: int, held_from: int
    ) -> Self:
        """What `in_order` gave."""
        batch_size, num_kv_heads = keys.shape[:2]
        head_dims = keys.shape[3], values.shape[3]
        held = cls.empty(sizes, (batch_size, num_kv_heads), head_dims, keys.dtype, keys.device)
        for states, stored in ((held.keys, keys), (held.values, values)):
            states[:, :, :num_first] = stored[:, :, :num_first]
        held.fill(keys[:, :, num_first:], values[:, :, num_first:], held_from)
        return held

    def write(self, keys: torch.Tensor, values: torch.Tensor, written: Written) -> None:
        """Keep what is to be kept of keys and values [batch_size, num_kv_heads, num_new, head_dim]."""
        places = written.places
        if places is None:
            return
        for held, new in ((self.keys, keys), (self.values, values)):
            if places.ndim == 2:
                held.scatter_(2, places[:, None, :, None].expand_as(new), new)
            else:
                held.index_copy_(2, places, new if written.indices is None else new.index_select(2, written.indices))

    def recent(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the positions start to stop - 1, which the ring has."""
        places = self._ring_places(torch.arange(start, stop, device=self.keys.device))
        return self.keys.index_select(2, places), self.values.index_select(2, places)

    def fill(self, keys: torch.Tensor, values: torch.Tensor, start: int) -> None:
        """Put keys and values of the positions from `start` on into the ring."""
        places = self._ring_places(torch.arange(start, start + keys.shape[2], device=self.keys.device))
        for held, new in ((self.keys, keys), (self.values, values)):
            held.index_copy_(2, places, new)

    def over_recent(
        self, keys: torch.Tensor, values: torch.Tensor, offset: int, start: int | torch.Tensor, stop: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values with the positions start to stop - 1 as they are.

        Written in place where these are numbers.

        Args:
            keys: [batch_size, num_kv_heads, num_slots, head_dim].
            values: The same for values.
            offset: The position of the first of them.
            start: An int or int64 [], at least `offset`.
            stop: The same.
        """
        if isinstance(start, int) and isinstance(stop, int):
            for states, newest in zip((keys, values), self.recent(start, stop), strict=True):
                states[:, :, start - offset : stop - offset] = newest
            return keys, values
        position = torch.arange(keys.shape[2], device=keys.device) + offset
        is_recent = ((position >= start) & (position < stop))[:, None]
        places = self._ring_places(position)
        keys, values = (
            torch.where(is_recent, held.index_select(2, places), states)
            for states, held in ((keys, self.keys), (values, self.values))
        )
        return keys, values

    def over_first(
        self, keys: torch.Tensor, values: torch.Tensor, offset: int, row_starts: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values as for `over_recent`, with the first tokens of a row as they are.

        Written in place where rows begin with their first token.
        """
        num_first = self.sizes.first
        if row_starts is None:
            for states, held in ((keys, self.keys), (values, self.values)):
                first = held[:, :, offset:num_first][:, :, : states.shape[2]]
                states[:, :, : first.shape[2]] = first
            return keys, values
        nth = torch.arange(keys.shape[2], device=keys.device) + offset - row_starts[:, None]
        is_first = ((nth >= 0) & (nth < num_first))[:, None, :, None]
        nth = nth.clamp(0, num_first - 1)[:, None, :, None]
        keys, values = (
            torch.where(is_first, held.take_along_dim(nth, dim=2), states)
            for held, states in ((self.keys, keys), (self.values, values))
        )
        return keys, values

    def forget(self, start: int, stop: int, row_starts: torch.Tensor | None) -> None:
        """Put zeros where the positions start to stop - 1 are.

        What nobody sees is multiplied with a weight of zero all the same, which hides no infinity.

        Args:
            start: The first that is forgotten; of first tokens, those after it too.
            stop: One past the last token that there is.
            row_starts: int32 [batch_size], the first token of every row that is no padding; None where no row is
                padded.
        """
        if self.sizes.ring:
            places = self._ring_places(torch.arange(max(start, stop - self.sizes.ring), stop, device=self.keys.device))
            for held in self.tensors():
                held.index_fill_(2, places, 0.0)
        if row_starts is None and start >= self.sizes.first:
            # Drafts that are taken back are not among the first.
            return
        nth = torch.arange(self.sizes.first, device=self.keys.device)
        is_left = (nth if row_starts is None else nth + row_starts[:, None, None]) < start
        for held in self.tensors():
            first = held[:, :, : self.sizes.first]
            first.copy_(torch.where(is_left[..., None], first, 0.0))

    def clear(self) -> None:
        """Put zeros everywhere."""
        for held in self.tensors():
            held.zero_()

    def in_order(self, num_first: int, held_from: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first tokens, and of the positions that the ring holds."""
        recent = self.recent(held_from, num_tokens)
        keys, values = (
            torch.cat([states[:, :, :num_first], newest], dim=2)
            for states, newest in zip((self.keys, self.values), recent, strict=True)
        )
        return keys, values

    def select(self, rows: torch.Tensor) -> Self:
        """The tokens of the rows `rows`, int64 [any]."""
        return self.map(lambda x: x.index_select(0, rows))

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with `function`, a choice of rows or a move, applied to every tensor."""
        mapped = copy(self)
        mapped.keys, mapped.values = function(self.keys), function(self.values)
        return mapped

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        return [self.keys, self.values]

    def _ring_places(self, position: torch.Tensor) -> torch.Tensor:
        return position % max(1, self.sizes.ring) + self.sizes.first
