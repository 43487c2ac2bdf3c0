"""How many tokens rows hold, and where they begin after padding."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import ClassVar, Self

import torch

from turboquant_hf.storage.tables import FullPrecisionSizes, Written, num_uncoded, overflow

Missing = tuple[int, int] | None
"""The first position of some, and one past the last; None for no position."""


class Length(ABC):
    """Tokens of every row, of which all have equally many, padding included.

    It knows which tokens full precision holds, for that follows from how many there are and were.

    Args:
        sizes: Tokens that are read in full precision.
        room: The most tokens of a row; None for any number.

    Attributes:
        is_counted: Whether the host knows it.
        stop: The position after the last token, an int or int64 []. Positions count those dropped.
        window: Tokens that a token sees, itself included, where those before are dropped; None to keep all.
        num_dropped: Tokens of a row that have left the window and are gone.
        is_empty: Whether the next tokens are the first.
        num_new: Tokens of the last call, as long as none was taken back.
        row_starts: int32 [batch_size], the first token of every row that is no padding: first tokens are counted from
            there, and nothing before is seen. None where no row is padded, or all tokens are codes.
    """

    is_counted: ClassVar[bool]
    stop: int | torch.Tensor
    window: int | None = None
    num_dropped = 0

    def __init__(self, sizes: FullPrecisionSizes, room: int | None = None) -> None:
        self.sizes = sizes
        self.room = room
        self.is_empty = True
        self.num_new = 0
        self.row_starts: torch.Tensor | None = None

    @property
    def num_seen(self) -> int:
        """Tokens of a row so far, those dropped included; waits for the device where it alone knows."""
        return int(self.stop)

    @property
    def num_tokens(self) -> int:
        """Tokens of a row that are stored."""
        return self.num_seen - self.num_dropped

    @abstractmethod
    def num_slots(self, num_new: int = 0) -> int:
        """Slots of a row that hold tokens, or may, with so many new ones; the first is of position `num_dropped`."""

    @abstractmethod
    def num_read(self, num_new: int | None = None) -> int:
        """How many of the slots, the last ones, a call of `num_new` tokens reads; None is the last call."""

    @property
    def num_uncoded(self) -> int:
        """First tokens of a row of which no codes are read."""
        return num_uncoded(self.sizes, self.row_starts)

    @abstractmethod
    def begin(self, num_new: int, row_starts: torch.Tensor | None, device: torch.device) -> tuple[Written, Missing]:
        """Before new tokens are stored.

        Args:
            num_new: How many they are.
            row_starts: With the first tokens of all, which of them is the first of every row that is no padding.
            device: Where they are.

        Returns:
            Where they go, and what is to be filled in before; see `missing`.

        Raises:
            IndexError: If the first tokens of all are more than there is room for.
        """

    @abstractmethod
    def advance(self) -> None:
        """After they are stored."""

    @abstractmethod
    def missing(self, num_tokens: int | None = None) -> Missing:
        """Recent tokens that full precision has not, and has to be filled with from the codes.

        Args:
            num_tokens: How many tokens are to be left; None for all.
        """

    @abstractmethod
    def filled(self, start: int) -> None:
        """After full precision was filled with what was missing from position `start` on."""

    @abstractmethod
    def first_recent(self, num_new: int) -> int | torch.Tensor:
        """The first recent position that the first of the last `num_new` tokens reads as it is, an int or int64 []."""

    def overflow(self) -> torch.Tensor | None:
        """What is added to what is read: NaN where tokens did not fit. None where all do."""
        return overflow(self.stop, self.room)

    @abstractmethod
    def crop(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens."""

    @abstractmethod
    def clear(self) -> None:
        """Forget every token; the next ones are the first."""

    @abstractmethod
    def select(self, rows: torch.Tensor) -> "Length":
        """The length of the rows `rows`, int64 [any]."""

    def drop(self) -> int:
        """Forget what no later token sees, in whole blocks; how many blocks these are."""
        return 0

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with `function`, a choice of rows or a move, applied to every tensor."""
        mapped = copy(self)
        mapped.row_starts = None if self.row_starts is None else function(self.row_starts)
        return mapped

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        return [] if self.row_starts is None else [self.row_starts]
