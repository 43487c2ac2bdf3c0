"""A length that is counted on the device."""

from collections.abc import Callable
from typing import Self

import torch

from turboquant_hf.storage.length import Length, Missing
from turboquant_hf.storage.static.addresses import keep_addresses
from turboquant_hf.storage.tables import MAX_STEP_TOKENS, FullPrecisionSizes, Written, written


class StaticLength(Length):
    """A length with a limit, in a tensor that keeps its address.

    One compiled step, or one CUDA graph, serves every length. What does not fit is not stored and turns what is
    attended to into NaN: a graph cannot raise an error.

    Args:
        sizes: Tokens that are read in full precision.
        room: The most tokens of a row.
        device: Where it is.
    """

    is_counted = False
    stop: torch.Tensor
    room: int

    def __init__(self, sizes: FullPrecisionSizes, room: int, device: torch.device) -> None:
        super().__init__(sizes, room)
        self.stop = torch.zeros((), dtype=torch.int64, device=device)
        # Whether a call that was interrupted may have written over the ring, and whether the one at work may.
        self._is_torn = self._tears = False
        keep_addresses(self.stop)

    def num_slots(self, num_new: int = 0) -> int:
        """All that there is room for."""
        return self.room

    def num_read(self, num_new: int | None = None) -> int:
        """All that there is room for."""
        return self.room

    def begin(self, num_new: int, row_starts: torch.Tensor | None, device: torch.device) -> tuple[Written, Missing]:
        """See `Length`."""
        self.num_new = num_new
        if self.is_empty:
            if num_new > self.room:
                raise IndexError(
                    f"the prompt has {num_new} tokens and the cache was made for max_length={self.room}; make it "
                    "with a larger max_length"
                )
            # A call that was interrupted here may have left a length.
            self.stop.zero_()
            self._begin_rows(row_starts)
        missing = self.missing()
        if not torch.compiler.is_compiling():
            self._tears = num_new > MAX_STEP_TOKENS and not self.is_empty
            self._is_torn = missing is not None or self._tears
        start = 0 if self.is_empty else self.stop
        return written.__wrapped__(start, num_new, 0, self.room, self.sizes, self.row_starts, device), missing

    def advance(self) -> None:
        """See `Length`."""
        self.stop.add_(self.num_new)
        self.is_empty = self._is_torn = False

    def missing(self, num_tokens: int | None = None) -> Missing:
        """See `Length`."""
        is_cropped = num_tokens is not None
        if not self.sizes.recent or torch.compiler.is_compiling() or not (is_cropped or self._is_torn):
            return None
        self._tears, held = False, self.num_tokens
        num_tokens = held if num_tokens is None else num_tokens
        # What the places of tokens that are taken back held before.
        start = max(self.sizes.first, num_tokens - self.sizes.ring)
        stop = num_tokens if self._is_torn else min(num_tokens, held - self.sizes.ring)
        return (start, stop) if start < stop else None

    def filled(self, start: int) -> None:
        """See `Length`."""
        self._is_torn = self._tears

    def first_recent(self, num_new: int) -> torch.Tensor:
        """See `Length`."""
        return self.stop - num_new - self.sizes.recent + 1

    def crop(self, num_tokens: int) -> None:
        """See `Length`."""
        self.stop.clamp_(max=num_tokens)
        if self.row_starts is not None:
            self.row_starts.clamp_(max=num_tokens)
        self.is_empty = num_tokens == 0

    def clear(self) -> None:
        """Forget every token, without waiting for the device."""
        self.stop.zero_()
        self.is_empty = True

    def select(self, rows: torch.Tensor) -> Self:
        """The same, with its rows in another order."""
        if self.row_starts is not None:
            self.row_starts.copy_(self.row_starts.index_select(0, rows))
        return self

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """See `Length`."""
        mapped = super().map(function)
        mapped.stop = function(self.stop)
        return mapped

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        return [self.stop, *super().tensors()]

    def _begin_rows(self, row_starts: torch.Tensor | None) -> None:
        """Have rows start there, in a tensor that stays where it is once there was a padded batch."""
        if self.row_starts is not None:
            self.row_starts.copy_(torch.zeros_like(self.row_starts) if row_starts is None else row_starts)
        elif row_starts is not None and self.sizes.first:
            self.row_starts = row_starts.clone()
            keep_addresses(self.row_starts)
