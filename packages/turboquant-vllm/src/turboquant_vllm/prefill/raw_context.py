"""What is raw of the contexts of rows that prefill."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from turboquant_core.ops.raw_copies import CodeRange
from turboquant_core.raw_copies import CopyRows, RawCopies
from turboquant_vllm.batch.prefill_rows import ContextPart, TokenGroups


@dataclass(frozen=True)
class RawContext:
    """The copies of a layer that stand for tokens of the rows' contexts.

    Attributes:
        rows: The rows and their copies.
        copies: Of the layer.
        codes: What of each context is attended to as codes.
        key_mean: float32 [num_kv_heads, head_dim] that keys are taken less of, or None.
    """

    rows: CopyRows
    copies: RawCopies
    codes: CodeRange
    key_mean: torch.Tensor | None = None

    def between(self, places: slice) -> "RawContext":
        """Those of some rows."""
        codes = CodeRange(self.codes.starts[places], self.codes.ends[places])
        return replace(self, rows=self.rows.between(places.start, places.stop), codes=codes)

    def of_groups(self, groups: TokenGroups) -> "RawContext":
        """Those of groups of tokens, each as a row of one token that comes after its context."""
        entries = self.rows.entries[groups.row]
        entries[:, self.rows.columns.sink_tokens + self.rows.columns.num_before :] = -1
        rows = replace(
            self.rows,
            entries=entries,
            seq_lens=groups.seq_lens + 1,
            query_start_loc=None,
            block_table=groups.block_table,
            num_tokens=len(entries),
            max_query_len=1,
        )
        starts = self.codes.starts[groups.row].minimum(groups.seq_lens)
        return replace(self, rows=rows, codes=CodeRange(starts, self.codes.ends[groups.row]))

    def restore(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        part: ContextPart,
        rotated: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Write copies over what was dequantised of a part.

        Args:
            key: [num_tokens + 1, num_kv_heads, head_dim]; the last row takes what is not of the part.
            value: The same.
            part: The stored tokens that the others are.
            rotated: The rotation that they are in.
        """
        columns, entries = self.rows.columns, self.rows.entries
        position, real, is_new = columns.positions(self.rows.seq_lens, self.rows.query_lens)
        is_sink = torch.arange(columns.num_columns, device=key.device) < columns.sink_tokens
        raw = torch.where(is_sink, position < self.codes.starts[:, None], position >= self.codes.ends[:, None])
        starts = part.starts[:, None]
        raw &= real & ~is_new & (entries >= 0) & (position >= starts) & (position < part.ends[:, None])
        at = torch.where(raw, part.start_loc[:-1, None] + position - starts, part.num_tokens)
        entry = entries.clamp(min=0)
        keys, values = self.copies.keys[entry], self.copies.values[entry]
        if self.key_mean is not None:
            keys = keys.float().sub_(self.key_mean)
        key[at] = rotated(keys.to(key.dtype))
        value[at] = rotated(values.to(value.dtype))
