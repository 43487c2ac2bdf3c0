"""What one batch looks like: decode rows first, then prefill rows."""

from dataclasses import dataclass

import torch

from turboquant_core.raw_copies import CopyRows
from turboquant_vllm.batch.prefill_rows import PrefillRows


@dataclass
class DecodeRows:
    """Rows of few query tokens, attended on codes.

    Attributes:
        num_tokens: Query tokens of all rows.
        max_query_len: The most query tokens of a row.
        query_start_loc: int32 [rows + 1], or None when every row has one token.
        seq_lens: int32 [rows].
        block_table: int32 [rows, max_blocks].
        copies: What of them is raw, or None.
    """

    num_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor | None
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    copies: CopyRows | None


@dataclass
class TurboQuantMetadata:
    """A batch.

    Attributes:
        decode: Rows that come first, or None.
        prefill: Rows that come after them, or None.
    """

    decode: DecodeRows | None
    prefill: PrefillRows | None
