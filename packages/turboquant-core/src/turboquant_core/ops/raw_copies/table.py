"""Which copy belongs to which slot of a cache: found, and given out, once a step for all layers."""

import torch

from turboquant_core._checks import check_int
from turboquant_core.ops.raw_copies import reference
from turboquant_core.ops.raw_copies.state import CopyState
from turboquant_core.raw_copies import CopyColumns


class CopyTable:
    """The copies of the slots of one block table, on the device alone: nothing is read back.

    New tokens get the copies that were not in use for longest. So those of a row that waits a few steps last, and so
    does the first token of a prompt that other requests share. A token for which there is none left has none, and a
    new token that is none of the columns takes the copy from its slot, which is of what the slot held before.

    Attributes:
        columns: The tokens of a row that have copies.
        num_slots: Slots of the cache.
        num_copies: Copies that each layer has.
    """

    def __init__(
        self,
        columns: CopyColumns,
        *,
        num_slots: int,
        num_copies: int,
        max_rows: int,
        device: torch.device | str | None = None,
    ) -> None:
        """A table of no copies in use.

        Args:
            columns: The tokens of a row that have copies.
            num_slots: Slots of the cache, blocks times tokens of a block.
            num_copies: Copies that each layer has.
            max_rows: The most rows of a step.
            device: Where lengths and block tables are.
        """
        self.columns = columns
        self.num_slots = check_int("num_slots", num_slots, 1, 2**31 - 1)
        self.num_copies = check_int("num_copies", num_copies, 1)
        self._step = 0

        def numbers(*shape: int, fill: int) -> torch.Tensor:
            return torch.full(shape, fill, dtype=torch.int32, device=device)

        self.state = CopyState(
            numbers(num_slots + 1, fill=-1),
            numbers(num_copies + 1, fill=-1),
            numbers(num_copies + 1, fill=0),
            numbers(num_copies, fill=0),
        )
        # CUDA graphs read it where it is.
        self._entries = numbers(max_rows, columns.num_columns, fill=-1)

    def assign(
        self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor, block_table: torch.Tensor, block_size: int
    ) -> torch.Tensor:
        """Find the copies of a step's rows, and give its new tokens theirs.

        Args:
            seq_lens: int32 [rows], stored tokens of every row, the query's included.
            query_start_loc: int32 [rows + 1], the first query token of every row, and the end of the last.
            block_table: int32 [rows, max_blocks].
            block_size: Tokens of a block.

        Returns:
            int32 [rows, num_columns], the copy of each column's token, -1 for none; at the same address every step.

        Raises:
            ValueError: If there are more rows than `max_rows`.
        """
        rows = len(seq_lens)
        if rows > len(self._entries):
            raise ValueError(f"a step has {rows} rows; this table has room for {len(self._entries)}")
        self._step += 1
        entries = self._entries[:rows]
        assign = reference.assign
        if seq_lens.is_cuda:
            from turboquant_core.ops.raw_copies.launch import assign
        assign(
            entries, self.state, seq_lens, query_start_loc, block_table, self.columns,
            num_slots=self.num_slots, block_size=block_size, step=self._step,
        )  # fmt: skip
        return entries
