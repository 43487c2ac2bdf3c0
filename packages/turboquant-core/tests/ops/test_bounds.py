"""No slot, block, length or offset has an operation write or read outside its memory.

What lies around it must stay as it is, and a result be that of the values that fit.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import IDENTITY
from turboquant_core.ops import cache_gather, cache_update, decode_attention
from turboquant_core.ops.cache_gather import launch as gather_launch
from turboquant_core.ops.cache_gather import reference as gather_reference
from turboquant_core.ops.cache_update.warpgroup import WARPGROUP
from turboquant_core.ops.decode_attention.paths import PATHS, PORTABLE
from turboquant_core.testing import gaussian
from turboquant_core.testing.decode import POISON, relative_error

# The interpreter computes in NumPy, which warns of the logarithm of zero, of padding and of sums that wrap.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NUM_BLOCKS, BLOCK_SIZE, GUARD = 4, 16, 6
NUM_SLOTS = NUM_BLOCKS * BLOCK_SIZE
HEADS, HEAD_DIM = 2, 64
LAYOUT = KVCacheLayout(TurboQuantConfig(HEAD_DIM, 4, 4), HEADS, BLOCK_SIZE)
INT32 = (-(2**31), 2**31 - 1)
INT64 = (-(2**63), 2**63 - 1)

bounded = settings(max_examples=200 if torch.cuda.is_available() else 15, deadline=None, derandomize=True)


def numbers(least, most, extremes):
    """Numbers about a range, and some far out."""
    return st.integers(least - 20, most + 20) | st.sampled_from(
        [*extremes, 2**30, -(2**30), extremes[0] + 1, extremes[1] - 1, 2**16]
    )


def int32(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def vectors(count, device, dtype=torch.bfloat16):
    return [gaussian(count * HEADS, HEAD_DIM, s).view(count, HEADS, HEAD_DIM).to(device, dtype) for s in (1, 2)]


def guarded(device):
    """Pages that store something, and the pool that they are part of, whose other pages are poison."""
    pool = torch.full((NUM_BLOCKS + 2 * GUARD, HEADS, LAYOUT.head_bytes), POISON, dtype=torch.uint8, device=device)
    pages = pool[GUARD:-GUARD]
    cache_update(*vectors(NUM_SLOTS, device), pages, torch.arange(NUM_SLOTS, device=device), LAYOUT, path="reference")
    return pool, pages


# ---------------------------------------------------------------------------------------------------------- update


def update_paths(device):
    vector = vectors(1, device)
    reason = WARPGROUP.obstacle(LAYOUT, IDENTITY, *vector, LAYOUT.allocate(1, device))
    return ["triton", "reference", *([] if reason else ["warpgroup"])]


def assert_only_slots_are_written(slots, device):
    key, value = vectors(len(slots), device)
    wanted = torch.tensor([slot if 0 <= slot < NUM_SLOTS else -1 for slot in slots], device=device)
    for path in update_paths(device):
        pool = torch.full((NUM_BLOCKS + 2 * GUARD, HEADS, LAYOUT.head_bytes), POISON, dtype=torch.uint8, device=device)
        expected = pool[GUARD:-GUARD].clone()
        cache_update(key, value, pool[GUARD:-GUARD], torch.tensor(slots, device=device), LAYOUT, path=path)
        cache_update(key, value, expected, wanted, LAYOUT, path=path)
        assert torch.equal(pool[GUARD:-GUARD], expected), path
        assert (pool[:GUARD] == POISON).all(), path
        assert (pool[-GUARD:] == POISON).all(), path
        blocks = {slot // BLOCK_SIZE for slot in slots if 0 <= slot < NUM_SLOTS}
        assert {i for i, page in enumerate(expected) if (page != POISON).any()} == blocks, path


@pytest.mark.parametrize("slot", [NUM_SLOTS, NUM_SLOTS + 40, 2**31, 2**62, INT64[1], -1, -NUM_SLOTS, *INT32, INT64[0]])
def test_a_slot_that_is_none_is_not_written(device, slot):
    assert_only_slots_are_written([0, slot, NUM_SLOTS - 1], device)


@bounded
@given(slots=st.lists(numbers(0, NUM_SLOTS - 1, INT64), min_size=1, max_size=9, unique=True))
def test_any_slots(device, slots):
    assert_only_slots_are_written(slots, device)


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_without_pages_nothing_is_written(device, path):
    cache_update(*vectors(2, device), LAYOUT.allocate(0, device), torch.arange(2, device=device), LAYOUT, path=path)


def test_keys_that_require_a_gradient_are_stored_whole(device):
    stored = []
    for requires_grad in (False, True):
        key, value = (x.clone().requires_grad_(requires_grad) for x in vectors(3, device, torch.float32))
        pages = LAYOUT.allocate(1, device)
        cache_update(key, value, pages, torch.arange(3, device=device), LAYOUT, path="reference")
        stored.append(pages)
    assert torch.equal(*stored)


# ---------------------------------------------------------------------------------------------------------- attend


def clip(x, least, most):
    return min(max(x, least), most)


def existing(block):
    return block if 0 <= block < NUM_BLOCKS else NUM_BLOCKS - 1


def decode_paths(device, pages):
    """On a GPU all; in the interpreter those of Triton are one kernel."""
    kernels = PATHS if device.type == "cuda" else [PORTABLE]
    return ["reference", *(path.name for path in kernels if path.obstacle(LAYOUT, device, pages) is None)]


def assert_attends_to_what_fits(device, table, lens, starts, ends, start_loc, num_tokens, options=None):
    """Compare with rows attended to one by one, with values that fit."""
    options = options or {}
    num_heads, most = 4, 3
    _, pages = guarded(device)
    layout = LAYOUT
    if table is None:
        layout = KVCacheLayout(LAYOUT.config, HEADS, BLOCK_SIZE)
    capacity = BLOCK_SIZE * (1 if table is None else len(table[0]))
    query = gaussian(num_tokens * num_heads, HEAD_DIM, 3).view(num_tokens, num_heads, HEAD_DIM).to(device)
    each = num_tokens // len(lens)
    expected = torch.zeros(num_tokens, num_heads, HEAD_DIM, device=device)
    covered = torch.zeros(num_tokens, dtype=torch.int64)
    for row, length in enumerate(lens):
        first, end = row * each, (row + 1) * each
        if start_loc is not None:
            first, end = (clip(x, 0, num_tokens) for x in start_loc[row : row + 2])
            end = first + clip(end - first, 0, most)
        if first == end:
            continue
        covered[first:end] += 1
        blocks = [row] if table is None else [existing(block) for block in table[row]]
        expected[first:end] = decode_attention(
            query[first:end],
            pages,
            int32([blocks], device),
            int32([clip(length, 0, capacity)], device),
            LAYOUT,
            seq_starts=None if starts is None else int32([clip(starts[row], 0, 2**20)], device),
            seq_ends=None if ends is None else int32([clip(ends[row], 0, 2**20)], device),
            path="reference",
            **options,
        )
    for path in decode_paths(device, pages):
        buffer = torch.full((num_tokens + 2 * GUARD, num_heads, HEAD_DIM), torch.nan, device=device)
        out = buffer[GUARD:-GUARD]
        given = decode_attention(
            query,
            pages,
            None if table is None else int32(table, device),
            int32(lens, device),
            layout,
            seq_starts=None if starts is None else int32(starts, device),
            seq_ends=None if ends is None else int32(ends, device),
            query_start_loc=None if start_loc is None else int32(start_loc, device),
            max_query_len=None if start_loc is None else most,
            out=out,
            return_lse=True,
            path=path,
            **options,
        )
        assert given[0] is out
        assert buffer[:GUARD].isnan().all(), path
        assert buffer[-GUARD:].isnan().all(), path
        # Of rows that overlap any may be the last to write.
        once = covered == 1
        assert out[once].isfinite().all(), path
        if path == "reference":
            assert torch.equal(out[once], expected[once])
        elif expected[once].any():
            assert relative_error(out[once], expected[once]) < 1e-2, path
        else:
            assert not out[once].any(), path


BAD_ROWS = {
    "a block past the pages": ([[0, 9]], [20]),
    "a block just past the pages": ([[0, NUM_BLOCKS]], [20]),
    "a block far past the pages": ([[0, 2**30]], [20]),
    "the largest number as a block": ([[0, INT32[1]]], [20]),
    "a negative block": ([[0, -1]], [20]),
    "the smallest number as a block": ([[0, INT32[0]]], [20]),
    "a length past the table": ([[0, 1]], [50]),
    "the largest number as a length": ([[0, 1]], [INT32[1]]),
    "a negative length": ([[0, 1]], [-5]),
    "the smallest number as a length": ([[0, 1], [2, 3]], [INT32[0], 20]),
    "a length past a contiguous row": (None, [50, 3]),
    "a negative length of a contiguous row": (None, [-1, 3]),
    "a table without columns": ([[], []], [20, 3]),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("options", [{}, {"window": 7}], ids=["all", "window"])
def test_rows_that_do_not_fit_are_clamped(device, name, options):
    table, lens = BAD_ROWS[name]
    assert_attends_to_what_fits(device, table, lens, None, None, None, 2 * len(lens), options)


@pytest.mark.parametrize("start", [25, 2**30, INT32[1], -3, INT32[0]])
def test_first_positions_that_do_not_fit_are_clamped(device, start):
    assert_attends_to_what_fits(device, [[0, 1]], [20], [start], None, None, 2)


@pytest.mark.parametrize("end", [25, 2**30, INT32[1], -3, INT32[0]])
def test_ends_that_do_not_fit_are_clamped(device, end):
    assert_attends_to_what_fits(device, [[0, 1]], [20], None, [end], None, 2)


@pytest.mark.parametrize(
    "start_loc",
    [[0, 5, 6], [0, -5, 2], [0, 500, 6], [4, 2, 6], [-3, 2, 4], [6, 6, 6], [7, 9, 8], [*INT32, 0], [0, *INT32]],
    ids=str,
)
def test_offsets_of_query_tokens_that_do_not_fit_are_clamped(device, start_loc):
    assert_attends_to_what_fits(device, [[0, 1], [2, 3]], [20, 30], None, None, start_loc, 6)


@bounded
@given(data=st.data(), batch=st.integers(1, 3), window=st.sampled_from([None, 1, 9, 2**40]))
def test_any_rows(device, data, batch, window):
    columns = data.draw(st.integers(1, 3))
    capacity = columns * BLOCK_SIZE

    def drawn(count, least, most):
        return data.draw(st.lists(numbers(least, most, INT32), min_size=count, max_size=count))

    table = [drawn(columns, 0, NUM_BLOCKS - 1) for _ in range(batch)]
    lens = drawn(batch, 0, capacity)
    starts, ends = (data.draw(st.none() | st.just(drawn(batch, 0, capacity))) for _ in range(2))
    num_tokens = 2 * batch
    start_loc = data.draw(st.none() | st.just(drawn(batch + 1, 0, num_tokens)))
    assert_attends_to_what_fits(device, table, lens, starts, ends, start_loc, num_tokens, {"window": window})


# ---------------------------------------------------------------------------------------------------------- gather


def assert_gathers_what_fits(device, monkeypatch, table, lens, starts, cu_seqlens, max_tokens):
    _, pages = guarded(device)
    capacity = BLOCK_SIZE * len(table[0])
    every = int32([list(range(NUM_BLOCKS))], device)
    stored = cache_gather(
        pages, every, int32([NUM_SLOTS], device), LAYOUT, max_tokens=NUM_SLOTS, dtype=torch.float32, path="reference"
    )[:2]
    begins = [0] * len(lens) if starts is None else [max(start, 0) for start in starts]
    if cu_seqlens is None:
        counts = [max(clip(length, 0, capacity) - begin, 0) for length, begin in zip(lens, begins, strict=True)]
        offsets = [sum(counts[:row]) for row in range(len(counts) + 1)]
    else:
        offsets = cu_seqlens
    slots = []
    for token in range(clip(offsets[-1], 0, max_tokens)):
        row = sum(end <= token for end in offsets[1:])
        # Sums wrap as 32-bit numbers do.
        position = (token - offsets[row] + begins[row] + 2**31) % 2**32 - 2**31
        position = clip(position, 0, capacity - 1)
        slots.append(existing(table[row][position // BLOCK_SIZE]) * BLOCK_SIZE + position % BLOCK_SIZE)
    buffers = []

    def empty_output(pages, layout, key_dtype, dtype, max_tokens):
        shape = (max_tokens + 2 * GUARD, layout.num_kv_heads, layout.config.head_dim)
        buffers[:] = [torch.full(shape, torch.nan, dtype=each, device=pages.device) for each in (key_dtype, dtype)]
        return tuple(buffer[GUARD : GUARD + max_tokens] for buffer in buffers)

    for module in (gather_launch, gather_reference):
        monkeypatch.setattr(module, "empty_output", empty_output)
    for path in ("triton", "reference"):
        *gathered, found = cache_gather(
            pages,
            int32(table, device),
            int32(lens, device),
            LAYOUT,
            starts=None if starts is None else int32(starts, device),
            cu_seqlens=None if cu_seqlens is None else int32(cu_seqlens, device),
            dtype=torch.float32,
            max_tokens=max_tokens,
            path=path,
        )
        assert found.tolist() == offsets
        for actual, expected, buffer in zip(gathered, stored, buffers, strict=True):
            torch.testing.assert_close(actual[: len(slots)], expected[slots], rtol=1e-6, atol=0)
            assert actual[len(slots) :].isnan().all(), path
            assert buffer[:GUARD].isnan().all(), path
            assert buffer[GUARD + max_tokens :].isnan().all(), path


@pytest.mark.parametrize("name", [name for name, (table, _) in BAD_ROWS.items() if table is not None and table[0]])
def test_rows_that_do_not_fit_are_gathered_clamped(device, monkeypatch, name):
    table, lens = BAD_ROWS[name]
    assert_gathers_what_fits(device, monkeypatch, table, lens, None, None, 50)


@pytest.mark.parametrize("starts", [[-3, 0], [25, 20], [INT32[0], INT32[1]]], ids=str)
def test_first_positions_that_do_not_fit_are_gathered_clamped(device, monkeypatch, starts):
    assert_gathers_what_fits(device, monkeypatch, [[0, 1], [2, 3]], [20, 30], starts, None, 50)


@pytest.mark.parametrize(
    "cu_seqlens",
    [
        [0, 20, 200],
        [-4, 20, 30],
        [10, 20, 15],
        [30, 10, 40],
        [0, 0, -1],
        [*INT32, 70],
        [0, 50, INT32[1]],
        [0, 50, 20, 60],
    ],
    ids=str,
)
@pytest.mark.parametrize("starts", [None, [5, -7, 3]], ids=str)
def test_offsets_that_do_not_fit_are_gathered_clamped(device, monkeypatch, cu_seqlens, starts):
    rows = slice(len(cu_seqlens) - 1)
    starts = None if starts is None else starts[rows]
    table, lens = [[0, 1], [2, 3], [1, 2]][rows], [20, 30, 25][rows]
    assert_gathers_what_fits(device, monkeypatch, table, lens, starts, cu_seqlens, 70)


@bounded
@given(data=st.data(), batch=st.integers(1, 3), max_tokens=st.integers(0, 70))
def test_any_rows_are_gathered(device, data, batch, max_tokens):
    columns = data.draw(st.integers(1, 3))
    capacity = columns * BLOCK_SIZE

    def drawn(count, least, most):
        return data.draw(st.lists(numbers(least, most, INT32), min_size=count, max_size=count))

    table = [drawn(columns, 0, NUM_BLOCKS - 1) for _ in range(batch)]
    lens = drawn(batch, 0, capacity)
    starts = data.draw(st.none() | st.just(drawn(batch, 0, capacity)))
    cu_seqlens = data.draw(st.none() | st.just(drawn(batch + 1, 0, 3 * capacity)))
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert_gathers_what_fits(device, monkeypatch, table, lens, starts, cu_seqlens, max_tokens)
