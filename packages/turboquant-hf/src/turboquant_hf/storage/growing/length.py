"""A length that is counted on the host."""

from typing import Self

import torch

from turboquant_hf.storage.length import Length, Missing
from turboquant_hf.storage.pages import BLOCK_SIZE
from turboquant_hf.storage.tables import CODES_ONLY, FullPrecisionSizes, Written, written


class GrowingLength(Length):
    """A length that is counted on the host, and has no limit.

    Args:
        sizes: Tokens that are read in full precision.
        window: Tokens that a token sees, itself included, where those before are dropped; None to keep all.
    """

    is_counted = True
    stop: int

    def __init__(self, sizes: FullPrecisionSizes = CODES_ONLY, window: int | None = None) -> None:
        super().__init__(sizes)
        self.stop = 0
        self.window = window
        self._ring = sizes.ring
        # The first position that the ring holds, and that it will hold at least after the call that is at work.
        self._held_from = sizes.first
        self._claimed_from = 0

    @classmethod
    def restored(
        cls, sizes: FullPrecisionSizes, num_tokens: int, num_recent: int, row_starts: torch.Tensor | None
    ) -> Self:
        """A length of `num_tokens` tokens, of which the newest `num_recent` are in the ring."""
        length = cls(sizes)
        length.stop, length.is_empty = num_tokens, num_tokens == 0
        length._held_from = max(sizes.first, num_tokens - num_recent)
        length.row_starts = row_starts
        return length

    def num_slots(self, num_new: int = 0) -> int:
        """See `Length`."""
        return self.num_tokens + num_new

    def num_read(self, num_new: int | None = None) -> int:
        """See `Length`; of a window what the tokens of the call see together."""
        if self.window is None:
            return self.stop
        num_new = self.num_new if num_new is None else num_new
        return min(self.stop - num_new, self.window - 1) + num_new

    @property
    def num_first(self) -> int:
        """First tokens that full precision has."""
        return min(self.sizes.first, self.stop)

    @property
    def held_from(self) -> int:
        """The first position that the ring holds; the number of tokens where it holds none."""
        return min(max(self.sizes.first, self._held_from), self.stop) if self.sizes.ring else self.stop

    def begin(self, num_new: int, row_starts: torch.Tensor | None, device: torch.device) -> tuple[Written, Missing]:
        """See `Length`."""
        if self.is_empty:
            # Layers share it and what is made of it, so that nobody may write into it.
            self.row_starts = row_starts if self.sizes.first else None
        self.num_new = num_new
        missing = self.missing()
        # A call that is interrupted from here on may have written over the ring.
        self._claimed_from = self.stop + num_new - self._ring
        self._held_from = max(self._held_from, self._claimed_from)
        place = written.__wrapped__ if torch.compiler.is_compiling() else written
        return place(self.stop, num_new, self.num_dropped, None, self.sizes, self.row_starts, device), missing

    def advance(self) -> None:
        """See `Length`."""
        self.stop += self.num_new
        self.is_empty = False

    def missing(self, num_tokens: int | None = None) -> Missing:
        """See `Length`."""
        if not self.sizes.recent:
            return None
        num_tokens = self.stop if num_tokens is None else num_tokens
        needed = max(self.sizes.first, num_tokens - self.sizes.recent + 1)
        self._claimed_from, self._held_from = 0, min(self._held_from, num_tokens)
        return (needed, self._held_from) if needed < self._held_from else None

    def filled(self, start: int) -> None:
        """See `Length`."""
        self._held_from = max(start, self._claimed_from)

    def first_recent(self, num_new: int) -> int:
        """See `Length`."""
        if not self.sizes.recent:
            return self.stop
        first = self.stop - num_new - self.sizes.recent + 1
        return min(self.stop, max(self.sizes.first, self._held_from, first))

    def crop(self, num_tokens: int) -> None:
        """See `Length`."""
        self.stop, self.num_new, self.is_empty = num_tokens, 0, num_tokens == 0
        if self.row_starts is not None:
            # A row of which padding alone is left begins with what comes.
            self.row_starts = self.row_starts.clamp(max=num_tokens)

    def clear(self) -> None:
        """See `Length`."""
        self.crop(0)
        self.num_dropped = 0
        self._held_from = 0

    def drop(self) -> int:
        """See `Length`."""
        if self.window is None:
            return 0
        blocks = max(0, self.num_tokens - (self.window - 1)) // BLOCK_SIZE
        self.num_dropped += blocks * BLOCK_SIZE
        return blocks

    def select(self, rows: torch.Tensor) -> Self:
        """See `Length`."""
        return self.map(lambda x: x.index_select(0, rows))
