"""Small tensors that the layers of a step share: made by the first that asks, found by the others."""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import torch

_Make = TypeVar("_Make", bound=Callable[..., torch.Tensor | None])


def _shared(make: _Make) -> _Make:
    """Remember what was made lately. Tensors among arguments are this package's own, and never written in place."""
    # A step later nobody asks for the same again.
    recent = lru_cache(maxsize=64)(make)

    @wraps(make)
    def shared(first: Any, *args: Any) -> torch.Tensor | None:
        # torch.compile traces into what it makes; it would warn of the cache. A length that is a tensor is another one
        # at the next step.
        is_fresh = torch.compiler.is_compiling() or isinstance(first, torch.Tensor)
        return make(first, *args) if is_fresh else recent(first, *args)

    return cast(_Make, shared)


@_shared
def slot_range(start: int, stop: int, device: torch.device) -> torch.Tensor:
    """The slots start to stop - 1, int64."""
    return torch.arange(start, stop, device=device)


@_shared
def row_lengths(length: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """The length of equally long rows, int32 [num_rows]."""
    return torch.full((num_rows,), length, dtype=torch.int32, device=device)


@_shared
def block_table(num_blocks: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """Block j of row b is page j * num_rows + b, int32 [num_rows, num_blocks]."""
    blocks, rows = (torch.arange(n, dtype=torch.int32, device=device) for n in (num_blocks, num_rows))
    return blocks * num_rows + rows[:, None]


@_shared
def not_a_number(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaN, [1]."""
    return torch.full((1,), torch.nan, dtype=dtype, device=device)


@_shared
def kept_indices(num_new: int, sink_tokens: int, ring_size: int, device: torch.device) -> torch.Tensor:
    """Which of new tokens may be kept, int64: as many of the first as there are sinks, and what the ring holds."""
    first = torch.arange(min(sink_tokens, num_new), device=device)
    last = torch.arange(max(sink_tokens, num_new - ring_size), max(sink_tokens, num_new), device=device)
    return torch.cat([first, last])


@_shared
def kept_slots(
    start: int | torch.Tensor,
    num_new: int,
    sink_tokens: int,
    ring_size: int,
    row_starts: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """The slots of new tokens, the first of which is at position `start`, int64.

    Those of `kept_indices`, or of all in every row, [rows, num_new], where rows start at positions of their own. Sinks
    come first, then the ring, then a slot that nobody reads for what is not kept.
    """
    if row_starts is None:
        indices = kept_indices(num_new, sink_tokens, ring_size, device)
    else:
        indices = torch.arange(num_new, device=device)
    position, unread = indices + start, sink_tokens + ring_size
    in_ring = sink_tokens + position % ring_size if ring_size else unread
    slot = torch.where(indices >= num_new - ring_size, in_ring, unread)
    sink = position if row_starts is None else position - row_starts[:, None]
    return torch.where((sink >= 0) & (sink < sink_tokens), sink, slot)


@_shared
def kept_bias(
    length: int | torch.Tensor,
    query_len: int,
    sink_tokens: int,
    recent_tokens: int,
    ring_size: int,
    window: int | None,
    starts: torch.Tensor | None,
    row_starts: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """What the last `query_len` of `length` tokens see of the kept slots, float32 [1 or rows, query_len, slots].

    0 where a token sees one, else minus infinity. A token sees the sinks of its row, the first from `row_starts`, int32
    [rows], on, and the newest `recent_tokens` tokens, up to itself; only what lies within `window`, and from `starts`,
    int32 [rows], on. A row that shows what comes before its sinks has codes of them: see `code_starts`.
    """
    query = torch.arange(query_len, device=device)[:, None] + (length - query_len)
    first = 0 if row_starts is None else row_starts[:, None, None]
    start = 0 if starts is None else starts[:, None, None]
    sinks = first + torch.arange(sink_tokens, device=device)
    newest = length - 1 - (length - 1 - torch.arange(ring_size, device=device)) % max(1, ring_size)

    def seen(position: torch.Tensor) -> torch.Tensor:
        within = (position <= query) & (position >= start)
        return within if window is None else within & (position > query - window)

    def is_recent(position: torch.Tensor) -> torch.Tensor:
        return position > query - recent_tokens

    is_sink, in_ring = seen(sinks), seen(newest) & is_recent(newest)
    if row_starts is None:
        in_ring = in_ring & (newest >= sink_tokens)
    else:
        shows_padding = start < first
        is_sink = is_sink & (is_recent(sinks) | ~shows_padding)
        in_ring = in_ring & ((newest >= first + sink_tokens) | (shows_padding & (newest < first)))
    shown = torch.cat([is_sink, in_ring], dim=-1)
    bias = torch.where(shown, 0.0, -torch.inf).view(-1, query_len, sink_tokens + ring_size)
    # The slot that nobody reads.
    return torch.nn.functional.pad(bias, (0, 1), value=-torch.inf)


@_shared
def code_starts(
    length: int | torch.Tensor, sink_tokens: int, starts: torch.Tensor | None, row_starts: torch.Tensor
) -> torch.Tensor:
    """The first position of every row that is read as codes, int32 [rows]: after its sinks, and from `starts` on.

    Args:
        length: Tokens of a row.
        sink_tokens: Sinks of a row.
        starts: int32 [rows], the first token that may be seen; None for the very first.
        row_starts: int32 [rows], the first token that is no padding. Where padding may be seen all the same, codes
            begin with it, and what is a sink is among them.
    """
    start = torch.zeros_like(row_starts) if starts is None else starts
    return torch.where(start < row_starts, start, torch.maximum(start, row_starts + sink_tokens))
