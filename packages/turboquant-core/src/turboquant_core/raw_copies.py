"""Which tokens have copies, and where a layer keeps them."""

from dataclasses import dataclass, replace

import torch

from turboquant_core._checks import check_int
from turboquant_core.config import TurboQuantConfig

# What the kernels hold of a row at a time.
MAX_COLUMNS = 256


@dataclass(frozen=True)
class CopyColumns:
    """The tokens of a row that have copies, as columns: its first ones, newest stored ones, and newest new ones.

    A step's query tokens are new, and what was stored before them is its context. A column is a position: the first
    tokens, then the context's newest, then the new tokens, or the newest of them where there are more. For a row of up
    to `max_query_len` query tokens the last two lie side by side and hold `recent_tokens`, each token's own included.

    Attributes:
        sink_tokens: First tokens of a row.
        recent_tokens: Newest tokens that a query token finds raw, itself included.
        max_query_len: The most query tokens of a row that attends on codes; no fewer than these are copied.
    """

    sink_tokens: int
    recent_tokens: int
    max_query_len: int = 1

    def __post_init__(self) -> None:
        check_int("sink_tokens", self.sink_tokens, 0)
        check_int("recent_tokens", self.recent_tokens, 0)
        check_int("max_query_len", self.max_query_len, 1)
        if self.num_columns > MAX_COLUMNS:
            raise ValueError(
                f"sink_tokens is {self.sink_tokens} and recent_tokens {self.recent_tokens}, which with drafts make "
                f"{self.num_columns} columns of raw tokens; there may be {MAX_COLUMNS}. Keep fewer raw."
            )

    @property
    def num_before(self) -> int:
        """The context's newest tokens."""
        return max(self.recent_tokens - 1, 0)

    @property
    def num_new(self) -> int:
        """The newest of the new tokens."""
        return max(self.num_before, self.max_query_len) if self.recent_tokens else 0

    @property
    def num_columns(self) -> int:
        """All of them."""
        return self.sink_tokens + self.num_before + self.num_new

    @property
    def copies_of_row(self) -> int:
        """Copies that a row holds from step to step."""
        return self.sink_tokens + (self.num_before + self.max_query_len if self.recent_tokens else 0)

    def positions(
        self, seq_lens: torch.Tensor, query_lens: torch.Tensor | int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The position of every row's columns, whether there is such a token, and whether it is new.

        Args:
            seq_lens: int32 [rows], stored tokens, the query's included.
            query_lens: Query tokens of every row, int32 [rows] or one number.

        Returns:
            Three tensors [rows, num_columns].
        """
        length = seq_lens[:, None]
        context = (seq_lens - query_lens).clamp(min=0)[:, None]
        column = torch.arange(self.num_columns, dtype=torch.int32, device=seq_lens.device)
        recent = column - self.sink_tokens
        new = torch.maximum(context, length - self.num_new) + (recent - self.num_before)
        position = torch.where(recent < self.num_before, context - self.num_before + recent, new)
        position = torch.where(recent < 0, column, position)
        real = (position < length) & ((recent < 0) | (position >= self.sink_tokens))
        return position, real, real & (position >= context)

    def left_behind(self, seq_lens: torch.Tensor, query_lens: torch.Tensor | int) -> torch.Tensor:
        """Positions [rows, n] that rows may have had a copy of in the step before, and have no column for any more.

        Negative where there is none.
        """
        first = (seq_lens - query_lens).clamp(min=0)[:, None] - self.num_before
        position = first - 1 - torch.arange(self.num_new, dtype=torch.int32, device=seq_lens.device)
        return torch.where(position >= self.sink_tokens, position, -1)

    def without_column(
        self, seq_lens: torch.Tensor, query_lens: torch.Tensor | int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the new tokens that have no column begin and end in every row, [rows, 1]; reversed for none."""
        context = (seq_lens - query_lens).clamp(min=0)[:, None]
        return context.clamp(min=self.sink_tokens), seq_lens[:, None] - self.num_new


@dataclass(frozen=True)
class RawCopies:
    """A layer's copies: the key and value of a token as they were given, and by what they are known again.

    A copy serves a token only if it is of the token's slot, and the slot has the scales that it had: whatever else
    wrote there meanwhile makes it stale by itself.

    Attributes:
        keys: [num_copies, num_kv_heads, head_dim].
        values: The same.
        slots: int32 [num_copies], the slot of each, -1 for none.
        scales: int16 [num_copies, num_kv_heads, scales of a key and a value], the bits of those in the slot.
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    scales: torch.Tensor

    @classmethod
    def allocate(
        cls,
        config: TurboQuantConfig,
        num_kv_heads: int,
        num_copies: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> "RawCopies":
        """Room for copies of keys and values of a type, stored as `config` says."""
        heads = num_copies, num_kv_heads
        keys, values = (torch.zeros(*heads, config.head_dim, dtype=dtype, device=device) for _ in range(2))
        num_scales = config.key_format.num_scales + config.value_format.num_scales
        return cls(
            keys,
            values,
            torch.full((num_copies,), -1, dtype=torch.int32, device=device),
            torch.zeros(*heads, num_scales, dtype=torch.int16, device=device),
        )


@dataclass(frozen=True)
class CodeRange:
    """The positions of every row that are attended to as codes; those around them have copies, each one that stands.

    Attributes:
        starts: int32 [rows], the first, as `decode_attention` takes it.
        ends: int32 [rows], one past the last, the same.
    """

    starts: torch.Tensor
    ends: torch.Tensor


@dataclass(frozen=True)
class CopyRows:
    """The copies of some rows in one step.

    Attributes:
        columns: What they are of.
        entries: int32 [rows, num_columns], the copy of each column's token, -1 for none.
        seq_lens: int32 [rows], stored tokens, the query's included.
        query_start_loc: int32 [rows + 1], the first query token of every row; None when all have equally many.
        block_table: int32 [rows, max_blocks].
        num_tokens: Query tokens of all rows.
        max_query_len: The most query tokens of a row.
    """

    columns: CopyColumns
    entries: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor | None
    block_table: torch.Tensor
    num_tokens: int
    max_query_len: int

    @property
    def query_lens(self) -> torch.Tensor | int:
        """Query tokens of every row."""
        return self.max_query_len if self.query_start_loc is None else self.query_start_loc.diff()

    @property
    def first_tokens(self) -> torch.Tensor:
        """The first query token of every row, and the end of the last, int32 [rows + 1]."""
        if self.query_start_loc is not None:
            return self.query_start_loc
        rows = torch.arange(len(self.seq_lens) + 1, dtype=torch.int32, device=self.seq_lens.device)
        return rows * self.max_query_len

    def raw(self, codes: CodeRange) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The position of every row's columns, whether a copy serves it, and whether it is new, [rows, num_columns]."""
        position, real, new = self.columns.positions(self.seq_lens, self.query_lens)
        is_sink = torch.arange(self.columns.num_columns, device=position.device) < self.columns.sink_tokens
        around = torch.where(is_sink, position < codes.starts[:, None], position >= codes.ends[:, None])
        return position, real & around & (self.entries >= 0), new

    def decoding(self, count: int, max_query_len: int, *, one_each: bool) -> "CopyRows":
        """The first `count` rows, of up to `max_query_len` query tokens, or of one each."""
        rows = replace(self.between(0, count), max_query_len=max_query_len)
        return replace(rows, query_start_loc=None) if one_each else rows

    def of_contexts(self, row: torch.Tensor, context_lens: torch.Tensor, block_table: torch.Tensor) -> "CopyRows":
        """The contexts of rows, int64 [n], in which none of the new tokens is seen, each with one token after it."""
        entries = self.entries[row]
        entries[:, self.columns.sink_tokens + self.columns.num_before :] = -1
        return replace(
            self,
            entries=entries,
            seq_lens=context_lens + 1,
            query_start_loc=None,
            block_table=block_table,
            num_tokens=len(entries),
            max_query_len=1,
        )

    def between(self, first: int, end: int) -> "CopyRows":
        """Rows first to end - 1."""
        start_loc = self.query_start_loc
        if start_loc is not None:
            start_loc = start_loc[first : end + 1]
            # CUDA graphs read it where it is.
            start_loc = start_loc - start_loc[0] if first else start_loc
        return replace(
            self,
            entries=self.entries[first:end],
            seq_lens=self.seq_lens[first:end],
            query_start_loc=start_loc,
            block_table=self.block_table[first:end],
        )
