"""Raw copies in plain PyTorch."""

import torch

from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._bounds import MAX_TOKENS, existing_blocks, row_capacity
from turboquant_core.ops.raw_copies.state import CopyState
from turboquant_core.raw_copies import CodeRange, CopyColumns, CopyRows, RawCopies

# As in the kernel: ages in steps that are told apart.
MOST_AGE = 255


def assign(
    entries: torch.Tensor,
    copies: CopyState,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    block_table: torch.Tensor,
    columns: CopyColumns,
    *,
    num_slots: int,
    block_size: int,
    step: int,
) -> None:
    """See `CopyTable.assign`."""
    num_copies, query_lens, num_blocks = len(copies.free), query_start_loc.diff(), num_slots // block_size

    def find(position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The slots of positions [rows, n], and their copies; -1 where there is none, as for a negative position."""
        block, offset, real = _place(position, block_table, num_blocks, block_size)
        slot = torch.where(real, block * block_size + offset, -1)
        # The last element belongs to none.
        found = copies.copy_of_slot[slot]
        return slot, torch.where(real & (copies.slot_of_copy[found] == slot), found, -1)

    # A copy that new tokens get no copy over is of what their slots held before.
    begin, end = columns.without_column(seq_lens, query_lens)
    capacity = row_capacity(num_blocks, block_table.shape[1], block_size)
    most = int((end.clamp(max=capacity) - begin).clamp(min=0).amax()) if len(seq_lens) else 0
    position = begin + torch.arange(most, dtype=torch.int32, device=seq_lens.device)
    _, overwritten = find(torch.where(position < end, position, -1))
    copies.slot_of_copy[overwritten] = -1
    copies.used[overwritten] = 0
    position, real, new = columns.positions(seq_lens, query_lens)
    # A row has no use any more for what it has left behind.
    _, left = find(columns.left_behind(seq_lens, query_lens))
    copies.used[left] = 0
    slot, found = find(torch.where(real, position, -1))
    held = found >= 0
    copies.used[found] = step
    wanted = (slot >= 0) & new & ~held
    rank = wanted.flatten().cumsum(0).view(wanted.shape) - 1
    used = copies.used[:num_copies]
    age = (step - used).clamp(max=MOST_AGE)
    # Where there are too few, all that are not in use.
    by_age = torch.nn.functional.pad(age.sort(descending=True).values, (0, 1))
    oldest = by_age[(wanted.sum() - 1).clamp(0, num_copies)].clamp(min=1)
    longest_ago = torch.where(age > oldest, 0, torch.where(age == oldest, 1, 2)).argsort(stable=True)
    taken = longest_ago[rank.clamp(0, num_copies - 1)].int()
    given = wanted & (rank < num_copies) & (used[taken] < step)
    at = torch.where(given, taken, -1)
    copies.slot_of_copy[at] = slot
    copies.used[at] = step
    copies.copy_of_slot[torch.where(given, slot, -1)] = taken
    entries.copy_(torch.where(held, found, at))


def copy_update(
    new: tuple[torch.Tensor, torch.Tensor] | None,
    pages: torch.Tensor,
    rows: CopyRows,
    copies: RawCopies,
    layout: KVCacheLayout,
    *,
    reads_new: bool,
) -> CodeRange:
    """See `turboquant_core.ops.raw_copies.copy_update`."""
    columns, entries = rows.columns, rows.entries
    capacity = row_capacity(len(pages), rows.block_table.shape[1], layout.block_size)
    seq_lens, query_lens = rows.seq_lens.clamp(0, capacity), rows.query_lens
    position, real, is_new = columns.positions(seq_lens, query_lens)
    context = (seq_lens - query_lens).clamp(min=0)
    block, offset, exists = _place(position, rows.block_table, len(pages), layout.block_size)
    held = real & (entries >= 0) & exists
    slot = block * layout.block_size + offset
    views = layout.views(pages)
    stored = torch.cat(
        [
            plane.view(torch.int16)[existing_blocks(block, len(pages)), :, offset]
            for plane in (views.key_scales, views.value_scales)
        ],
        dim=-1,
    )
    entry = entries.clamp(min=0)
    valid = held & (copies.slots[entry] == slot) & (copies.scales[entry] == stored).flatten(2).all(-1)
    if new is not None:
        written = held & is_new
        token = (rows.first_tokens[:-1] - context)[:, None] + position
        at = entry[written].long()
        for copied, given in zip((copies.keys, copies.values), new, strict=True):
            copied[at] = given[token[written]]
        copies.slots[at] = slot[written]
        copies.scales[at] = stored[written]
        valid = valid | written
    missing = real & ~valid
    column = torch.arange(columns.num_columns, dtype=torch.int32, device=seq_lens.device)
    is_sink = column < columns.sink_tokens
    starts = (
        torch.where(missing & is_sink, column, columns.sink_tokens).amin(-1) if columns.sink_tokens else context * 0
    )
    if not columns.num_new:
        return CodeRange(starts.int(), torch.full_like(seq_lens, MAX_TOKENS))
    ends = context - columns.num_before
    # First tokens from the missing one on are codes, also where the newest begin before them.
    read = torch.where(is_sink, real & (column >= starts[:, None]), missing)
    if reads_new:
        # More new tokens than there are columns: those before the newest are codes.
        ends = torch.where(seq_lens - context > columns.num_new, seq_lens - columns.num_new, ends)
    else:
        read = read & ~is_new
    ends = torch.maximum(ends, torch.where(read, position + 1, 0).amax(-1)).clamp(min=0)
    return CodeRange(starts.int(), ends.int())


def _place(
    position: torch.Tensor, block_table: torch.Tensor, num_blocks: int, block_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The block of positions [rows, n], the token of it, and whether there are both."""
    capacity = row_capacity(num_blocks, block_table.shape[1], block_size)
    inside = position.clamp(0, max(capacity - 1, 0))
    block = block_table.gather(1, (inside // block_size).long())
    return block, inside % block_size, (position == inside) & (block >= 0) & (block < num_blocks)
