"""Raw copies: a paged cache that grows step by step, attended to as codes and copies together."""

from dataclasses import dataclass

import pytest
import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.ops import cache_update, decode_attention
from turboquant_core.ops.decode_attention.reference import stored_row
from turboquant_core.ops.merge_attention import merge_copies
from turboquant_core.ops.merge_attention import reference as merge_reference
from turboquant_core.ops.raw_copies import CopyTable, copy_update, reference
from turboquant_core.raw_copies import CopyColumns, CopyRows, RawCopies

pytest.importorskip("triton")

from turboquant_core.ops.merge_attention import launch as merge_launch
from turboquant_core.ops.raw_copies import launch
from turboquant_core.ops.raw_copies.state import CopyState

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK_SIZE, KV_HEADS, GROUP, HEAD_DIM = 8, 2, 3, 64
SCALE = HEAD_DIM**-0.5
MOST_BLOCKS = 12


@dataclass
class Row:
    """A row of the cache: its blocks, and all keys and values that were stored."""

    blocks: list
    keys: torch.Tensor
    values: torch.Tensor


class Cache:
    """Rows that grow, with copies of some of their tokens."""

    def __init__(self, columns, num_rows, *, num_copies=None, config=None, transform=IDENTITY):
        self.layout = KVCacheLayout(config or TurboQuantConfig(HEAD_DIM, 4, 4), KV_HEADS, BLOCK_SIZE)
        self.columns, self.transform = columns, transform
        self.generator = torch.Generator().manual_seed(0)
        num_blocks = 1 + num_rows * MOST_BLOCKS
        order = (1 + torch.randperm(num_blocks - 1, generator=self.generator)).tolist()
        empty = torch.empty(0, KV_HEADS, HEAD_DIM, device=DEVICE)
        self.rows = [Row(order[at * MOST_BLOCKS : (at + 1) * MOST_BLOCKS], empty, empty) for at in range(num_rows)]
        self.pages = torch.full((num_blocks, KV_HEADS, self.layout.head_bytes), 255, dtype=torch.uint8, device=DEVICE)
        num_copies = num_copies or num_rows * columns.copies_of_row
        self.table = CopyTable(
            columns, num_slots=num_blocks * BLOCK_SIZE, num_copies=num_copies, max_rows=num_rows, device=DEVICE
        )
        self.copies = RawCopies.allocate(self.layout.config, KV_HEADS, num_copies, torch.float32, DEVICE)

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(DEVICE)

    def step(self, query_lens, *, dropped=0):
        """Rows by number with as many new tokens each, stored; what to attend with, and where it begins."""
        used = [self.rows[number] for number in query_lens]
        new = []
        for row, count in zip(used, query_lens.values(), strict=True):
            kept = len(row.keys) - dropped
            key, value = self.draw(count, KV_HEADS, HEAD_DIM) + 1, self.draw(count, KV_HEADS, HEAD_DIM)
            row.keys = torch.cat([row.keys[:kept], key])
            row.values = torch.cat([row.values[:kept], value])
            position = range(kept, kept + count)
            slots = [row.blocks[at // BLOCK_SIZE] * BLOCK_SIZE + at % BLOCK_SIZE for at in position]
            new.append((key, value, torch.tensor(slots, device=DEVICE)))
        key, value, slots = (torch.cat(parts) for parts in zip(*new, strict=True))
        cache_update(key, value, self.pages, slots, self.layout, key_transform=self.transform)
        lens = torch.tensor(list(query_lens.values()), dtype=torch.int32, device=DEVICE)
        seq_lens = torch.tensor([len(row.keys) for row in used], dtype=torch.int32, device=DEVICE)
        table = torch.tensor([row.blocks for row in used], dtype=torch.int32, device=DEVICE)
        start_loc = torch.nn.functional.pad(lens.cumsum(0, dtype=torch.int32), (1, 0))
        rows = CopyRows(
            self.columns,
            self.assign(seq_lens, start_loc, table),
            seq_lens,
            start_loc,
            table,
            num_tokens=int(lens.sum()),
            max_query_len=int(lens.max()),
        )
        return (key, value), rows, used

    def assign(self, seq_lens, start_loc, table):
        """Both implementations, which agree on what they give and on what they remember."""
        state, arguments = self.table.state, (seq_lens, start_loc, table, self.columns)
        left = CopyState(*(part.clone() for part in vars(state).values()))
        found, expected = torch.full((2, len(seq_lens), self.columns.num_columns), -5, dtype=torch.int32, device=DEVICE)
        options = {"num_slots": self.table.num_slots, "block_size": BLOCK_SIZE, "step": self.table._step + 1}
        reference.assign(expected, left, *arguments, **options)
        kept = CopyState(*(part.clone() for part in vars(state).values()))
        launch.assign(found, kept, *arguments, **options)
        assert torch.equal(found, expected)
        for name in ("copy_of_slot", "slot_of_copy", "used"):
            assert torch.equal(getattr(kept, name)[:-1], getattr(left, name)[:-1])
        assert torch.equal(self.table.assign(seq_lens, start_loc, table, BLOCK_SIZE), expected)
        return expected

    def update(self, new, rows, **options):
        """Both implementations, which agree on what they give and on what they leave."""
        left = RawCopies(*(part.clone() for part in vars(self.copies).values()))
        expected = reference.copy_update(
            new, self.pages, rows, left, self.layout, reads_new=options.get("reads_new", True)
        )
        found = launch.copy_update(
            new, self.pages, rows, self.copies, self.layout, reads_new=options.get("reads_new", True)
        )
        for one, other in zip(vars(found).values(), vars(expected).values(), strict=True):
            assert torch.equal(one, other)
        for one, other in zip(vars(self.copies).values(), vars(left).values(), strict=True):
            assert torch.equal(one, other)
        return copy_update(new, self.pages, rows, self.copies, self.layout, **options)

    def attend(self, rows, codes, **options):
        """Attention on codes and copies, by both implementations."""
        query = self.draw(rows.num_tokens, KV_HEADS * GROUP, HEAD_DIM)
        out, lse = decode_attention(
            query, self.pages, rows.block_table, rows.seq_lens, self.layout, scale=SCALE,
            query_start_loc=rows.query_start_loc, max_query_len=rows.max_query_len, seq_starts=codes.starts,
            seq_ends=codes.ends, key_transform=self.transform, return_lse=True, path="reference", **options,
        )  # fmt: skip
        plain = [out.clone(), lse.clone()]
        arguments = (rows, self.copies, codes)
        options = {"scale": SCALE, "window": options.get("window") or 0, "softcap": options.get("softcap") or 0.0}
        merge_launch.merge_copies(query, out, lse, *arguments, **options, mean=None)
        merge_reference.merge_copies(query, *plain, *arguments, **options, mean=None)
        torch.testing.assert_close(out, plain[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse, plain[1], rtol=1e-4, atol=1e-5)
        return query, out, lse

    def exact(self, query, rows, used, raw, *, window=None, softcap=None, sinks=None):
        """Attention in float64 where the positions `raw` of every row are as they were, and the others as stored."""
        outputs, sums, at = [], [], 0
        for row, number, count in zip(used, range(len(used)), rows.query_start_loc.diff().tolist(), strict=True):
            length = len(row.keys)
            keys, values = stored_row(self.pages, rows.block_table, number, length, self.layout, torch.float64)
            keys, values = self.transform.restored(keys.transpose(0, 1)), values.transpose(0, 1).clone()
            position = torch.tensor(sorted(raw[number]), dtype=torch.long, device=DEVICE)
            keys[position], values[position] = row.keys[position].double(), row.values[position].double()
            q = query[at : at + count].double().transpose(0, 1)
            keys, values = (x.transpose(0, 1).repeat_interleave(GROUP, 0) for x in (keys, values))
            logits = q @ keys.transpose(1, 2) * SCALE
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            behind = torch.arange(length - count, length, device=DEVICE)[:, None] - torch.arange(length, device=DEVICE)
            logits = logits.masked_fill((behind < 0) | (behind >= (window or length)), -torch.inf)
            if sinks is not None:
                logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, count, 1)], dim=-1)
            outputs.append((logits.softmax(-1)[..., :length] @ values).transpose(0, 1))
            sums.append(logits.logsumexp(-1).T)
            at += count
        return torch.cat(outputs), torch.cat(sums)


def assert_attends(cache, rows, used, codes, raw, **options):
    query, out, lse = cache.attend(rows, codes, **options)
    expected, expected_lse = cache.exact(query, rows, used, raw, **options)
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=1e-4)


def newest(columns, rows, used):
    """The positions that the rule says are raw of every row."""
    lens = rows.query_start_loc.diff().tolist()
    return [
        {*range(min(columns.sink_tokens, len(row.keys)))}
        | {*range(max(len(row.keys) - count + 1 - columns.recent_tokens, 0), len(row.keys))}
        for row, count in zip(used, lens, strict=True)
    ]


@pytest.mark.parametrize(
    "options",
    [{}, {"window": 20}, {"softcap": 2.0}, {"sinks": ...}, {"window": 3}],
    ids=lambda o: "-".join(o) or "plain",
)
@pytest.mark.parametrize(("sinks", "recent"), [(1, 16), (0, 3), (2, 1), (3, 0)])
def test_first_and_newest_tokens_are_raw_from_step_to_step(options, sinks, recent):
    columns = CopyColumns(sinks, recent)
    cache = Cache(columns, 3)
    if "sinks" in options:
        options = {"sinks": cache.draw(KV_HEADS * GROUP)}
    cache.update(*cache.step({0: 40, 1: 5, 2: 1})[:2], reads_new=False)
    for order in ([0, 1, 2], [2, 0], [1, 0, 2]):
        new, rows, used = cache.step(dict.fromkeys(order, 1))
        codes = cache.update(new, rows)
        raw = newest(columns, rows, used) if recent else [{*range(min(sinks, len(row.keys)))} for row in used]
        if sinks and recent > 1 and not options:
            assert codes.starts.tolist() == [sinks] * len(used)
        assert_attends(cache, rows, used, codes, raw, **options)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="no launch overlaps another in the interpreter")
@pytest.mark.parametrize("rows_of_step", [1, 24])
def test_operations_that_begin_while_the_ones_before_run_give_the_same_bits(rows_of_step):
    cache = Cache(CopyColumns(1, 16), rows_of_step)
    cache.update(*cache.step(dict.fromkeys(range(rows_of_step), 60))[:2], reads_new=False)
    new, rows, _ = cache.step(dict.fromkeys(range(rows_of_step), 1))
    query = cache.draw(rows.num_tokens, KV_HEADS * GROUP, HEAD_DIM)

    slots = torch.full((len(new[0]),), -1, device=DEVICE)

    def step(overlaps):
        """One layer's; what it stores is there already."""
        cache_update(*new, cache.pages, slots, cache.layout)
        codes = copy_update(new, cache.pages, rows, cache.copies, cache.layout, follows_update=overlaps)
        out, lse = decode_attention(
            query, cache.pages, rows.block_table, rows.seq_lens, cache.layout, seq_starts=codes.starts,
            seq_ends=codes.ends, return_lse=True,
        )  # fmt: skip
        merge_copies(query, out, lse, rows, cache.copies, codes, scale=SCALE, follows_attention=overlaps)
        return out, lse

    expected = step(False)
    step(True)
    # As engines launch them: one behind the other.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = [step(True) for _ in range(50)]
    for _ in range(10):
        graph.replay()
        for out, lse in found:
            assert torch.equal(out, expected[0])
            assert torch.equal(lse, expected[1])
            out.fill_(torch.nan)


@pytest.mark.parametrize("split", [False, True])
def test_keys_that_were_transformed(split):
    mean, scale = torch.randn(2, KV_HEADS, HEAD_DIM).to(DEVICE)
    order = torch.randn(KV_HEADS, HEAD_DIM).argsort(-1).to(DEVICE)
    columns, config = CopyColumns(1, 8), TurboQuantConfig(HEAD_DIM, 4, 4, key_split=split)
    cache = Cache(columns, 2, config=config, transform=KeyTransform(mean, (scale / 2).exp(), order))
    cache.update(*cache.step({0: 30, 1: 12})[:2], reads_new=False)
    new, rows, used = cache.step({0: 1, 1: 1})
    assert_attends(cache, rows, used, cache.update(new, rows), newest(columns, rows, used))


def test_drafts_are_raw_and_so_is_what_is_before_them_once_some_are_dropped():
    columns = CopyColumns(1, 4, max_query_len=4)
    cache = Cache(columns, 2)
    cache.update(*cache.step({0: 21, 1: 13})[:2], reads_new=False)
    for lens, dropped in (({0: 4, 1: 4}, 0), ({0: 4, 1: 2}, 3), ({1: 3, 0: 1}, 1), ({0: 1}, 0)):
        new, rows, used = cache.step(lens, dropped=dropped)
        assert_attends(cache, rows, used, cache.update(new, rows), newest(columns, rows, used))


def test_whatever_else_writes_a_page_makes_its_copies_stale():
    columns = CopyColumns(1, 4)
    cache = Cache(columns, 1)
    cache.update(*cache.step({0: 20})[:2], reads_new=False)
    row = cache.rows[0]
    for position in (18, 0):
        # Another key in the place of one that has a copy.
        slot = torch.tensor([row.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE], device=DEVICE)
        key, value = cache.draw(1, KV_HEADS, HEAD_DIM), row.values[position : position + 1]
        cache_update(key, value, cache.pages, slot, cache.layout)
        row.keys[position] = key
    new, rows, used = cache.step({0: 1})
    codes = cache.update(new, rows)
    assert (codes.starts.tolist(), codes.ends.tolist()) == ([0], [19])
    assert_attends(cache, rows, used, codes, [{19, 20}])
    # Both come out of the newest tokens.
    cache.step({0: 1})
    new, rows, used = cache.step({0: 1})
    assert cache.update(new, rows).ends.tolist() == [22]


def test_a_token_that_is_written_without_a_copy_takes_that_of_its_slot_also_if_the_scales_are_the_same():
    """As of the same token at another position: in the first layer its key is only rotated otherwise."""
    columns = CopyColumns(1, 4)
    cache = Cache(columns, 2, num_copies=40)
    cache.update(*cache.step({0: 16})[:2], reads_new=False)
    first, second = cache.rows
    second.blocks = [first.blocks[1], first.blocks[0], *second.blocks[2:]]
    cache.update(*cache.step({1: 30})[:2], reads_new=False)
    # A key the other way round is as long.
    slot = torch.tensor([first.blocks[1] * BLOCK_SIZE + 7], device=DEVICE)
    key, value = -first.keys[15:], first.values[15:]
    cache_update(key, value, cache.pages, slot, cache.layout)
    # As a row that shares the first block of this one.
    second.keys, second.values = torch.cat([second.keys[:7], key]), torch.cat([second.values[:7], value])
    new, rows, used = cache.step({1: 1})
    codes = cache.update(new, rows)
    assert (codes.starts.tolist(), codes.ends.tolist()) == ([1], [8])
    assert_attends(cache, rows, used, codes, [{0, 8}])


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_short_row_that_lost_one_of_its_first_tokens_reads_it_and_those_after_it_as_codes(lost):
    """The newest tokens, which have copies, begin before it."""
    columns = CopyColumns(3, 8)
    cache = Cache(columns, 1)
    cache.update(*cache.step({0: 5})[:2], reads_new=False)
    cache.copies.slots[cache.copies.slots == cache.rows[0].blocks[0] * BLOCK_SIZE + lost] = -1
    new, rows, used = cache.step({0: 1})
    codes = cache.update(new, rows)
    assert (codes.starts.tolist(), codes.ends.tolist()) == ([lost], [3])
    assert_attends(cache, rows, used, codes, [{*range(lost), 3, 4, 5}])


def test_a_row_that_is_assigned_for_other_lengths_is_read_as_codes():
    """As by a draft that moves the lengths of a step without describing it anew."""
    columns = CopyColumns(1, 4)
    cache = Cache(columns, 1)
    cache.update(*cache.step({0: 20})[:2], reads_new=False)
    new, rows, used = cache.step({0: 1})
    cache.update(new, rows)
    stale = rows.entries.clone()
    new, rows, used = cache.step({0: 1})
    rows = CopyRows(**{**vars(rows), "entries": stale})
    codes = cache.update(new, rows)
    assert codes.ends.tolist() == [21]
    assert_attends(cache, rows, used, codes, [{0, 21}])


def test_a_layer_that_shares_a_cache_reads_what_its_owner_copied():
    columns = CopyColumns(1, 4)
    cache = Cache(columns, 1)
    cache.update(*cache.step({0: 20})[:2], reads_new=False)
    new, rows, _ = cache.step({0: 1})
    owner = cache.update(new, rows)
    sharing = cache.update(None, rows)
    assert torch.equal(owner.starts, sharing.starts)
    assert torch.equal(owner.ends, sharing.ends)


def test_too_few_copies_leave_codes():
    columns = CopyColumns(1, 4)
    cache = Cache(columns, 3, num_copies=columns.copies_of_row)
    cache.update(*cache.step({0: 20, 1: 20, 2: 20})[:2], reads_new=False)
    new, rows, used = cache.step({0: 1, 1: 1, 2: 1})
    codes = cache.update(new, rows)
    raw = [
        {*range(start)} | {*range(end, len(row.keys))}
        for start, end, row in zip(codes.starts.tolist(), codes.ends.tolist(), used, strict=True)
    ]
    assert sum(map(len, raw)) <= columns.copies_of_row
    assert_attends(cache, rows, used, codes, raw)


def test_copies_that_were_not_in_use_for_longest_are_given_out_first():
    columns = CopyColumns(1, 2)
    cache = Cache(columns, 2, num_copies=8)
    cache.update(*cache.step({0: 10})[:2])
    cache.update(*cache.step({0: 1})[:2])
    # Row 0 waits, and row 1 takes what nobody uses, some of it again and again.
    cache.update(*cache.step({1: 10})[:2])
    for _ in range(2):
        cache.update(*cache.step({1: 1})[:2])
    new, rows, used = cache.step({0: 1})
    codes = cache.update(new, rows)
    assert (codes.starts.tolist(), codes.ends.tolist()) == ([1], [10])
    assert_attends(cache, rows, used, codes, newest(columns, rows, used))


def test_the_first_token_of_a_prompt_that_rows_share():
    columns = CopyColumns(1, 2)
    cache = Cache(columns, 2)
    cache.update(*cache.step({0: 17})[:2])
    first, second = cache.rows
    second.blocks[:2], second.keys, second.values = first.blocks[:2], first.keys[:16], first.values[:16]
    new, rows, used = cache.step({1: 3, 0: 1})
    codes = cache.update(new, rows)
    assert codes.starts.tolist() == [1, 1]
    # Of a row of more query tokens than have columns, the newest.
    assert_attends(cache, rows, used, codes, [{0, 18}, {0, 16, 17}])


def test_rows_of_nothing_and_blocks_that_are_not_there():
    columns = CopyColumns(2, 4)
    cache = Cache(columns, 3)
    cache.update(*cache.step({0: 20, 1: 1})[:2])
    new, rows, _ = cache.step({0: 1, 1: 1})
    padded = CopyRows(
        columns,
        torch.nn.functional.pad(rows.entries, (0, 0, 0, 1), value=0),
        torch.nn.functional.pad(rows.seq_lens, (0, 1)),
        torch.nn.functional.pad(rows.query_start_loc, (0, 1), value=2),
        torch.nn.functional.pad(rows.block_table, (0, 0, 0, 1), value=2**30),
        rows.num_tokens,
        rows.max_query_len,
    )
    codes = cache.update(new, padded)
    assert codes.starts.tolist() == [2, 2, 2]
    _, out, lse = cache.attend(padded, codes)
    assert out.isfinite().all()
    assert lse.isfinite().all()


def test_a_table_says_how_many_rows_it_has_room_for():
    cache = Cache(CopyColumns(1, 4), 1)
    lens = torch.ones(2, dtype=torch.int32, device=DEVICE)
    starts = torch.arange(3, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="2 rows; this table has room for 1"):
        cache.table.assign(lens, starts, torch.ones(2, 4, dtype=torch.int32, device=DEVICE), BLOCK_SIZE)


@pytest.mark.parametrize("merge", [merge_launch.merge_copies, merge_reference.merge_copies])
def test_what_is_no_number_in_a_copy_stays_in_its_row(merge):
    """Rows that lack tokens for some columns have no copy there, and must not read that of another row."""
    cache = Cache(CopyColumns(2, 8), 2)
    new, rows, _ = cache.step({0: 12, 1: 1})
    cache.update(new, rows)
    new, rows, _ = cache.step({0: 1, 1: 1})
    codes = cache.update(new, rows)
    first = rows.entries[0][rows.entries[0] >= 0].long()
    for copied in (cache.copies.keys, cache.copies.values):
        copied[first] = torch.nan
        # What columns without a copy would name.
        copied[0] = torch.nan
    assert not (rows.entries[1] == 0).any()
    query = cache.draw(2, KV_HEADS * GROUP, HEAD_DIM)
    out, lse = torch.zeros_like(query), torch.full(query.shape[:2], -torch.inf, device=DEVICE)
    merge(query, out, lse, rows, cache.copies, codes, scale=SCALE, window=0, softcap=0.0, mean=None)
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("sizes", [(-1, 4), (1, -1), (300, 0), (0, 200), (1, 4, 0)])
def test_columns_that_cannot_be(sizes):
    with pytest.raises(ValueError, match=r"tokens|max_query_len"):
        CopyColumns(*sizes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_mean", [True, False])
def test_other_types(dtype, with_mean):
    columns = CopyColumns(1, 40, max_query_len=3)
    cache = Cache(columns, 2)
    cache.copies = RawCopies.allocate(cache.layout.config, KV_HEADS, cache.table.num_copies, dtype, DEVICE)
    new, rows, _ = cache.step({0: 60, 1: 30})
    copy_update(tuple(x.to(dtype) for x in new), cache.pages, rows, cache.copies, cache.layout, reads_new=False)
    new, rows, _ = cache.step({0: 3, 1: 1})
    codes = copy_update(tuple(x.to(dtype) for x in new), cache.pages, rows, cache.copies, cache.layout)
    query, out = (cache.draw(4, KV_HEADS * GROUP, HEAD_DIM).to(dtype) for _ in range(2))
    mean = cache.draw(KV_HEADS, HEAD_DIM) if with_mean else None
    lse = cache.draw(4, KV_HEADS * GROUP)
    results = []
    for merge in (merge_launch.merge_copies, merge_reference.merge_copies):
        given = out.clone(), lse.clone()
        options = {"scale": SCALE, "window": 0, "softcap": 0.0, "mean": mean}
        merge(query, *given, rows, cache.copies, codes, **options)
        results.append(given)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
