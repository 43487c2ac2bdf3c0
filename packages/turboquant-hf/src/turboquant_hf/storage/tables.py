"""Where the tokens of a call go and what they see, in small tensors that the layers of a step share.

What was made lately is remembered: a step later nobody asks for the same again. Tensors among arguments are this
package's own, and never written in place. Whoever has a length on the device, which is, or is traced by torch.compile,
which would warn of the cache, takes `__wrapped__`.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

MAX_STEP_TOKENS = 8
"""Tokens of a call that attends on the codes, and that can be taken back as if they had never come.

Decode attention takes twice as many; each more keeps a recent token more in full precision.
"""


class FullPrecisionSizes(NamedTuple):
    """How many tokens of a row are read as they are.

    Attributes:
        first: First tokens: attention sinks.
        recent: Newest tokens: what a token sees of itself and those before it.
    """

    first: int = 0
    recent: int = 0

    @property
    def ring(self) -> int:
        """Recent tokens that there is room for.

        `MAX_STEP_TOKENS` more, so that a call of as many tokens finds what its first one sees, and that as many can be
        taken back.
        """
        return self.recent + MAX_STEP_TOKENS if self.recent else 0

    def within(self, window: int) -> "FullPrecisionSizes":
        """Of layers whose tokens see a window: no token reads more recent ones than that."""
        return self._replace(recent=min(self.recent, window))


CODES_ONLY = FullPrecisionSizes()


class Written(NamedTuple):
    """Where the new tokens of a call go.

    Attributes:
        num_slots: Slots of a row that hold tokens once these are stored, or may.
        may_be_first: Whether some may be first tokens, or come right after these.
        slots: int64 [num_new], of the pages; negative ones are not stored.
        indices: int64, which of them may go into full precision; None for all.
        places: int64, as many as these, or [rows, num_new] where rows begin with padding: where they go there. None if
            none does.
    """

    num_slots: int
    may_be_first: bool
    slots: torch.Tensor
    indices: torch.Tensor | None
    places: torch.Tensor | None


class Seen(NamedTuple):
    """What the tokens of a call see.

    Attributes:
        has_codes: Whether any may see codes.
        lengths: int32 [rows], the slots of a row before which there are codes to see.
        starts: int32 [rows], the first slot of every row that is seen as codes; None for the very first.
        window: Tokens before `lengths` that a token sees codes of, as if it came last; None for all.
        places: bool [1 or rows, query_len, places]: whether a token sees a place of full precision; None where there
            is none.
        overflow: float32 [], added to what is attended to: NaN where tokens did not fit, else 0. None where all do.
    """

    has_codes: bool
    lengths: torch.Tensor
    starts: torch.Tensor | None
    window: int | None
    places: torch.Tensor | None
    overflow: torch.Tensor | None


@lru_cache(maxsize=64)
def written(
    start: int | torch.Tensor,
    num_new: int,
    num_dropped: int,
    room: int | None,
    sizes: FullPrecisionSizes,
    row_starts: torch.Tensor | None,
    device: torch.device,
) -> Written:
    """Where new tokens go.

    Args:
        start: The position of the first, an int or int64 [].
        num_new: How many they are.
        num_dropped: Tokens of a row that came before those in the pages; 0 where the device knows the start.
        room: The most tokens of a row; None for any number, where the host knows the start.
        sizes: Tokens in full precision.
        row_starts: int32 [rows], the first token of every row that is no padding; None where no row is padded.
        device: Where they are.
    """
    if isinstance(start, int):
        num_slots, may_be_first = start - num_dropped + num_new, start <= sizes.first
        slots = torch.arange(num_slots - num_new, num_slots, device=device)
    else:
        slots, num_slots, may_be_first = torch.arange(num_new, device=device) + start, 0, False
    if room is not None:
        slots, num_slots = torch.where(slots < room, slots, -1), room
    is_past_first = isinstance(start, int) and start >= sizes.first and row_starts is None
    if not sizes.ring and (is_past_first or not sizes.first):
        return Written(num_slots, may_be_first, slots, None, None)
    indices = _full_precision_indices(num_new, sizes, device) if row_starts is None else None
    kept = torch.arange(num_new, device=device) if indices is None else indices
    places = _places(kept, start, num_new, sizes, row_starts)
    return Written(num_slots, may_be_first, slots, None if len(kept) == num_new else indices, places)


def _full_precision_indices(num_new: int, sizes: FullPrecisionSizes, device: torch.device) -> torch.Tensor:
    """Which of new tokens may be kept, int64: as many of the first as may be first ones, and what the ring holds."""
    first = torch.arange(min(sizes.first, num_new), device=device)
    last = torch.arange(max(sizes.first, num_new - sizes.ring), max(sizes.first, num_new), device=device)
    return torch.cat([first, last])


def _places(
    indices: torch.Tensor,
    start: int | torch.Tensor,
    num_new: int,
    sizes: FullPrecisionSizes,
    row_starts: torch.Tensor | None,
) -> torch.Tensor:
    """The places of some of the new tokens: first tokens, then the ring, then a place that nobody reads for others."""
    position, unread = indices + start, sizes.first + sizes.ring
    # Dynamo of torch 2.10 does not trace tensor % int.
    in_ring = sizes.first + torch.remainder(position, sizes.ring) if sizes.ring else unread
    place = torch.where(indices >= num_new - sizes.ring, in_ring, unread)
    nth = position if row_starts is None else position - row_starts[:, None]
    return torch.where((nth >= 0) & (nth < sizes.first), nth, place)


@lru_cache(maxsize=64)
def seen(
    length: int | torch.Tensor,
    query_len: int,
    num_dropped: int,
    room: int | None,
    sizes: FullPrecisionSizes,
    window: int | None,
    starts: torch.Tensor | None,
    row_starts: torch.Tensor | None,
    num_rows: int,
    device: torch.device,
) -> Seen:
    """What the last `query_len` of `length` tokens see.

    Args:
        length: An int or int64 [].
        query_len: How many they are.
        num_dropped: Tokens of a row that came before those in the pages; 0 where the device knows the length.
        room: The most tokens of a row; None for any number.
        sizes: Tokens in full precision.
        window: Tokens that a token sees, itself included; None for all.
        starts: int32 [num_rows], the first token of every row that may be seen, counted from the row's very first; None
            for that.
        row_starts: As for `written`.
        num_rows: Rows.
        device: Where they are.
    """
    if row_starts is not None and window is not None:
        # Padding that has left the window is not shown, whether or not the mask still says where rows begin.
        starts = (torch.zeros_like(row_starts) if starts is None else starts).clamp(min=length - query_len - window + 1)
    num_coded = length - sizes.recent
    if isinstance(num_coded, torch.Tensor):
        lengths = num_coded.clamp(0, room).int().repeat(num_rows)
    else:
        lengths = torch.full((num_rows,), max(0, num_coded - num_dropped), dtype=torch.int32, device=device)
    # The codes that a token sees end before its recent tokens, as if it came as many tokens earlier.
    has_codes = window is None or window > sizes.recent
    if has_codes and isinstance(num_coded, int):
        has_codes = num_coded > num_uncoded(sizes, row_starts)
    code_starts = _code_starts(length, sizes, starts, row_starts, num_rows, device)
    if code_starts is not None and num_dropped:
        code_starts = (code_starts - num_dropped).clamp(min=0)
    return Seen(
        has_codes,
        lengths,
        code_starts,
        None if window is None else window - sizes.recent,
        None if sizes == CODES_ONLY else _seen_places(length, query_len, sizes, window, starts, row_starts, device),
        overflow(length, room),
    )


def overflow(length: int | torch.Tensor, room: int | None) -> torch.Tensor | None:
    """What is added to what is read: NaN where a length on the device is more than the room, else 0."""
    if not isinstance(length, torch.Tensor):
        return None
    assert room is not None
    return torch.where(length > room, torch.nan, 0.0)


def num_uncoded(sizes: FullPrecisionSizes, row_starts: torch.Tensor | None) -> int:
    """First tokens of a row of which no codes are read. Where rows are padded, a mask may show the padding."""
    return sizes.first if row_starts is None else 0


def _code_starts(
    length: int | torch.Tensor,
    sizes: FullPrecisionSizes,
    starts: torch.Tensor | None,
    row_starts: torch.Tensor | None,
    num_rows: int,
    device: torch.device,
) -> torch.Tensor | None:
    """After the first tokens of a row, and from `starts` on.

    Where padding may be seen all the same, codes begin with it, and what is a first token is among them.
    """
    if row_starts is not None:
        start = torch.zeros_like(row_starts) if starts is None else starts
        return torch.where(start < row_starts, start, torch.maximum(start, row_starts + sizes.first))
    if not sizes.first:
        return starts
    if starts is None:
        return torch.full((num_rows,), sizes.first, dtype=torch.int32, device=device)
    return starts.clamp(min=sizes.first)


def _seen_places(
    length: int | torch.Tensor,
    query_len: int,
    sizes: FullPrecisionSizes,
    window: int | None,
    starts: torch.Tensor | None,
    row_starts: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """A token sees the first tokens of its row and the newest `sizes.recent`, up to itself, of what it may see.

    A row that shows what comes before its first token has codes of both: see `_code_starts`.
    """
    query = torch.arange(query_len, device=device)[:, None] + (length - query_len)
    first = 0 if row_starts is None else row_starts[:, None, None]
    start = 0 if starts is None else starts[:, None, None]
    firsts = first + torch.arange(sizes.first, device=device)
    newest = length - 1 - torch.remainder(length - 1 - torch.arange(sizes.ring, device=device), max(1, sizes.ring))

    def within(position: torch.Tensor) -> torch.Tensor:
        seen = (position <= query) & (position >= start)
        return seen if window is None else seen & (position > query - window)

    def is_recent(position: torch.Tensor) -> torch.Tensor:
        return position > query - sizes.recent

    is_first, in_ring = within(firsts), within(newest) & is_recent(newest)
    if row_starts is None:
        in_ring = in_ring & (newest >= sizes.first)
    else:
        shows_padding = start < first
        is_first = is_first & (is_recent(firsts) | ~shows_padding)
        in_ring = in_ring & ((newest >= first + sizes.first) | (shows_padding & (newest < first)))
    return torch.cat([is_first, in_ring], dim=-1).view(-1, query_len, sizes.first + sizes.ring)
