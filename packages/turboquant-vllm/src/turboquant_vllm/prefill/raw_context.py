"""What is raw of the contexts of rows that prefill."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from turboquant_core.raw_copies import CodeRange, CopyRows, RawCopies
from turboquant_vllm.batch.prefill_rows import ContextPart, TokenGroups, WindowPart


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

    def of_window(self, part: WindowPart) -> "RawContext":
        """Those of the rows of a part."""
        assert part.rows.copies is not None
        codes = CodeRange(self.codes.starts[part.places], self.codes.ends[part.places])
        return replace(self, rows=part.rows.copies, codes=codes)

    def of_groups(self, groups: TokenGroups) -> "RawContext":
        """Those of groups of tokens."""
        assert groups.copies is not None
        starts = self.codes.starts[groups.row].minimum(groups.seq_lens)
        return replace(self, rows=groups.copies, codes=CodeRange(starts, self.codes.ends[groups.row]))

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
        position, raw, is_new = self.rows.raw(self.codes)
        starts = part.starts[:, None]
        raw = raw & ~is_new & (position >= starts) & (position < part.ends[:, None])
        at = torch.where(raw, part.start_loc[:-1, None] + position - starts, part.num_tokens)
        entry = self.rows.entries.clamp(min=0)
        keys, values = self.copies.keys[entry], self.copies.values[entry]
        if self.key_mean is not None:
            keys = keys.float().sub_(self.key_mean)
        key[at] = rotated(keys.to(key.dtype))
        value[at] = rotated(values.to(value.dtype))
