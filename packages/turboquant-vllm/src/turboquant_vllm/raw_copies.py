"""Raw copies of the first and newest tokens, beside pages that hold every token as codes."""

from typing import Any

import torch

from turboquant_core.ops.decode_attention import MAX_QUERY_LEN
from turboquant_core.ops.raw_copies import CopyTable
from turboquant_core.raw_copies import CopyColumns, CopyRows
from turboquant_vllm._compat.engine import all_layers
from turboquant_vllm._compat.interface import CommonAttentionMetadata
from turboquant_vllm.settings import Settings


def most_query_tokens(vllm_config: Any) -> int:
    """The most tokens of a row that verifies a draft, in any version of vLLM: some count a parallel draft twice."""
    speculative = vllm_config.speculative_config
    if speculative is None:
        return 1
    drafted = speculative.num_speculative_tokens or 0
    return 1 + (2 * drafted if speculative.parallel_drafting else drafted)


def copy_columns(vllm_config: Any, settings: Settings) -> CopyColumns:
    """Which tokens of a row an engine keeps raw copies of."""
    query_len = most_query_tokens(vllm_config)
    # Longer drafts are verified as prefills.
    return CopyColumns(settings.sink_tokens, settings.recent_tokens, query_len if query_len <= MAX_QUERY_LEN else 1)


# Rows that read a context's newest tokens and copy others of their own in one step.
PREFILLING_ROWS = 8


def num_copies(vllm_config: Any, settings: Settings) -> int:
    """Copies of each layer: what as many rows hold as a step may have; 0 where nothing is copied."""
    columns, max_rows = copy_columns(vllm_config, settings), vllm_config.scheduler_config.max_num_seqs
    return int(max_rows * columns.copies_of_row + min(max_rows, PREFILLING_ROWS) * columns.num_new)


class GroupCopies:
    """The copies of the layers that share one block table."""

    def __init__(self, layer_names: list[str], vllm_config: Any, settings: Settings, device: torch.device) -> None:
        self._columns = copy_columns(vllm_config, settings)
        self._num_copies = num_copies(vllm_config, settings)
        self._max_rows = vllm_config.scheduler_config.max_num_seqs
        self._layer = all_layers(vllm_config)[layer_names[0]]
        self._device = device
        self._table: CopyTable | None = None

    def of_step(self, common: CommonAttentionMetadata) -> CopyRows:
        """Find the copies of a step's rows, and give its new tokens theirs."""
        num_blocks, _, block_size, _ = self._layer.kv_cache.shape
        if self._table is None:
            # The cache is there from the first step on, which is before any graph.
            self._table = CopyTable(
                self._columns,
                num_slots=num_blocks * block_size,
                num_copies=self._num_copies,
                max_rows=self._max_rows,
                device=self._device,
            )
        rows = common.num_reqs
        seq_lens, block_table = common.seq_lens[:rows], common.block_table_tensor[:rows]
        query_start_loc = common.query_start_loc[: rows + 1]
        entries = self._table.assign(seq_lens, query_start_loc, block_table, block_size)
        return CopyRows(
            self._columns,
            entries,
            seq_lens,
            query_start_loc,
            block_table,
            num_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
        )
