"""Rows that prefill, and what is planned for them once a batch, for all layers."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import torch
from torch.nn.functional import pad

from turboquant_core.ops.cache_gather import cumulative_lengths
from turboquant_core.raw_copies import CopyRows
from turboquant_vllm.workspace import MOST_WORKSPACE_TOKENS

# New tokens of a group, which read the codes of their context together.
GROUP_LEN = 8
# Groups are filled up to one of these numbers, for every other is another kernel to compile. Partial results of more
# groups would take more memory than dequantised tokens do.
GROUP_COUNTS = (32, 128, 512)
# Rows of up to so many new tokens read their context as codes: 16 of each of 16 rows over 16,384 stored ones take an
# H200 0.66 ms a layer, and 0.71 dequantised; with 32 it is 1.16 and 0.72.
MOST_GROUPED_TOKENS = 16


@dataclass(frozen=True)
class ContextPart:
    """Stored tokens that are dequantised at a time.

    Attributes:
        starts: int32 [rows], the first of every row.
        ends: int32 [rows], one past the last.
        start_loc: int32 [rows + 1], where every row begins among them.
        num_tokens: Of all rows.
        max_len: The most of a row.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    start_loc: torch.Tensor
    num_tokens: int
    max_len: int


@dataclass(frozen=True)
class TokenGroups:
    """New tokens of rows that have few, in groups that see the same context; the last group, at least, is empty.

    Attributes:
        row: int64 [groups], the row of every group; any for an empty one.
        token: int64 [groups, GROUP_LEN], which of all rows' tokens are in a group; a group with fewer repeats its last.
        group: int64 [num_tokens], the group of every token: the empty one for tokens of other rows.
        place: int64 [num_tokens], its place in the group.
        seq_lens: int32 [groups], the length of the context.
        block_table: int32 [groups, max_blocks], of the context.
        copies: What of the contexts is raw, each group a row of one token that comes after its context; or None.
    """

    row: torch.Tensor
    token: torch.Tensor
    group: torch.Tensor
    place: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    copies: CopyRows | None


@dataclass
class PrefillRows:
    """Rows of many query tokens, which attend to their own keys and values as they are.

    Attributes:
        num_tokens: Query tokens of all rows.
        max_query_len: The most query tokens of a row.
        query_start_loc: int32 [rows + 1], from 0.
        context_lens: int32 [rows], stored tokens before the row's first query token.
        context_lens_cpu: The same as numbers.
        query_lens_cpu: Query tokens of every row.
        block_table: int32 [rows, max_blocks].
        copies: What of them is raw, or None.
        workspace_tokens: Stored tokens that are dequantised at a time.
        most_grouped_tokens: Rows of up to so many query tokens read their context as codes.
    """

    num_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    context_lens: torch.Tensor
    context_lens_cpu: list[int]
    query_lens_cpu: list[int]
    block_table: torch.Tensor
    copies: CopyRows | None = None
    workspace_tokens: int = MOST_WORKSPACE_TOKENS
    most_grouped_tokens: int = MOST_GROUPED_TOKENS

    @property
    def max_context_len(self) -> int:
        """The longest context of a row."""
        return max(self.context_lens_cpu)

    @cached_property
    def context_parts(self) -> tuple[ContextPart, ...]:
        """The contexts of rows that are in no group, equally many tokens of every row at a time."""
        dense = [
            0 if grouped else context for grouped, context in zip(self._grouped, self.context_lens_cpu, strict=True)
        ]
        longest = max(dense)
        context_lens = self.context_lens
        if dense != self.context_lens_cpu and longest:
            context_lens = _to_device(torch.tensor(dense, dtype=torch.int32), self.context_lens.device)
        step = max(1, self.workspace_tokens // max(1, sum(map(bool, dense))))
        parts = []
        for start in range(0, longest, step):
            lens = [min(max(length - start, 0), step) for length in dense]
            ends = context_lens.clamp(max=start + step)
            starts = torch.full_like(ends, start).minimum(ends)
            parts.append(ContextPart(starts, ends, cumulative_lengths(ends, starts), sum(lens), max(lens)))
        return tuple(parts)

    @cached_property
    def groups(self) -> TokenGroups | None:
        """The tokens of rows that read their context as codes, or None if there are none."""
        if not any(self._grouped):
            return None
        lens, grouped = torch.tensor(self.query_lens_cpu), torch.tensor(self._grouped)
        first_token = lens.cumsum(0) - lens
        counts = torch.where(grouped, -(-lens // GROUP_LEN), 0)
        first_group = counts.cumsum(0) - counts
        row = torch.arange(len(lens)).repeat_interleave(counts)
        first_within = (torch.arange(len(row)) - first_group[row]) * GROUP_LEN
        within = (first_within[:, None] + torch.arange(GROUP_LEN)).minimum(lens[row, None] - 1)
        num_empty = next(count for count in GROUP_COUNTS if count > len(row)) - len(row)
        row_of_token = torch.arange(len(lens)).repeat_interleave(lens)
        at = (first_group * GROUP_LEN - first_token)[row_of_token] + torch.arange(self.num_tokens)
        planned = (
            pad(row, (0, num_empty)),
            pad(first_token[row, None] + within, (0, 0, 0, num_empty)).flatten(),
            torch.where(grouped[row_of_token], at, (len(row) + num_empty - 1) * GROUP_LEN),
        )
        # One copy, which nothing waits for.
        copied = _to_device(torch.cat(planned), self.context_lens.device)
        row_of_group, token, at = torch.split(copied, [len(part) for part in planned])
        seq_lens = pad(self.context_lens[row_of_group[: len(row)]], (0, num_empty))
        block_table = self.block_table[row_of_group]
        return TokenGroups(
            row_of_group,
            token.view(-1, GROUP_LEN),
            at // GROUP_LEN,
            at % GROUP_LEN,
            seq_lens,
            block_table,
            None if self.copies is None else self.copies.of_contexts(row_of_group, seq_lens, block_table),
        )

    def window_parts(self, window: int) -> "list[WindowPart]":
        """What the windows of the rows' tokens reach, those tokens included, as many rows at a time as may be."""
        if window not in self._window_parts:
            self._window_parts[window] = self._plan_windows(window)
        return self._window_parts[window]

    @cached_property
    def _window_parts(self) -> "dict[int, list[WindowPart]]":
        """Those that a layer asked for."""
        return {}

    def _plan_windows(self, window: int) -> "list[WindowPart]":
        lens = [
            min(context, window - 1) + own
            for context, own in zip(self.context_lens_cpu, self.query_lens_cpu, strict=True)
        ]
        bounds, filled = [0], 0
        for row, length in enumerate(lens):
            if filled and filled + length > self.workspace_tokens:
                bounds.append(row)
                filled = 0
            filled += length
        bounds.append(len(lens))
        first_token = 0
        parts = []
        for first, end in pairwise(bounds):
            rows = self._between(first, end)
            starts = (rows.context_lens - (window - 1)).clamp(min=0)
            ends = rows.context_lens + rows.query_start_loc.diff()
            reached = lens[first:end]
            context = ContextPart(starts, ends, cumulative_lengths(ends, starts), sum(reached), max(reached))
            tokens = slice(first_token, first_token + rows.num_tokens)
            parts.append(WindowPart(tokens, slice(first, end), rows, context))
            first_token += rows.num_tokens
        return parts

    def _between(self, first: int, end: int) -> "PrefillRows":
        """Rows first to end - 1."""
        if (first, end) == (0, len(self.query_lens_cpu)):
            return self
        query_lens_cpu = self.query_lens_cpu[first:end]
        return replace(
            self,
            num_tokens=sum(query_lens_cpu),
            max_query_len=max(query_lens_cpu),
            query_start_loc=self.query_start_loc[first : end + 1] - self.query_start_loc[first],
            context_lens=self.context_lens[first:end],
            context_lens_cpu=self.context_lens_cpu[first:end],
            query_lens_cpu=query_lens_cpu,
            block_table=self.block_table[first:end],
            copies=None if self.copies is None else self.copies.between(first, end),
        )

    @cached_property
    def _grouped(self) -> list[bool]:
        """For every row whether it reads its context as codes."""
        lens = zip(self.context_lens_cpu, self.query_lens_cpu, strict=True)
        grouped = [context > 0 and own <= self.most_grouped_tokens for context, own in lens]
        num_groups = sum(-(-own // GROUP_LEN) for own, few in zip(self.query_lens_cpu, grouped, strict=True) if few)
        return grouped if num_groups < GROUP_COUNTS[-1] else [False] * len(grouped)


@dataclass(frozen=True)
class WindowPart:
    """Rows whose windows are dequantised at a time.

    Attributes:
        tokens: Where their query tokens lie among those of all rows.
        places: Where they lie among all rows.
        rows: Those rows.
        reached: What their windows reach.
    """

    tokens: slice
    places: slice
    rows: PrefillRows
    reached: ContextPart

    @cached_property
    def own(self) -> torch.Tensor:
        """Where the rows' own tokens lie among those reached, int64 [num_tokens]: at the end of every row's."""
        ends, starts = self.reached.start_loc[1:], self.rows.query_start_loc
        lens = _to_device(torch.tensor(self.rows.query_lens_cpu), starts.device)
        row = torch.repeat_interleave(lens, output_size=self.rows.num_tokens)
        return (ends - starts[1:])[row] + torch.arange(self.rows.num_tokens, device=starts.device)


def _to_device(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    if device.type == "cuda":
        numbers = numbers.pin_memory()
    return numbers.to(device, non_blocking=True)
