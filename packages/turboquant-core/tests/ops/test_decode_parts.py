import sys
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from turboquant_core import KVCacheLayout, TurboQuantConfig, grid_codebook
from turboquant_core.codebook import ascending_codes
from turboquant_core.ops import _dispatch, _path
from turboquant_core.ops._card import Card, card_of
from turboquant_core.ops._path import find_path
from turboquant_core.ops.decode_attention.centroids import unit_variance_centroids
from turboquant_core.ops.decode_attention.fragment.lookup import key_lookup, split_key_lookup, value_lookup
from turboquant_core.ops.decode_attention.fragment.positions import bit_swaps, key_channels, value_channels
from turboquant_core.ops.decode_attention.fragment.sizes import fragment_launch
from turboquant_core.ops.decode_attention.launch import plan
from turboquant_core.ops.decode_attention.paths import PATHS, choose_path
from turboquant_core.ops.decode_attention.portable import lookup as portable_lookup
from turboquant_core.ops.decode_attention.portable.lookup import PARTS, entries, entry_unit, entry_words
from turboquant_core.ops.decode_attention.portable.prepare import _write_cu_tiles
from turboquant_core.ops.decode_attention.portable.sizes import portable_launch
from turboquant_core.ops.decode_attention.schedule import owner, query_heads, share_start
from turboquant_core.ops.decode_attention.sizes import DecodeShape, padded_batch, representative_batches
from turboquant_core.testing import MODEL_SHAPES
from turboquant_core.testing.decode import DecodeCase, build, relative_error
from turboquant_core.vector_format import SPLIT_BITS

# The interpreter computes in NumPy, which warns of the logarithm of zero.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BITS = (2, 3, 4, 5, 6, 8)
CPU = torch.device("cpu")

# ---------------------------------------------------------------------------------------------------------- look-up


class Ptx:
    """Runs the integer and float16-pair instructions of a look-up on NumPy arrays of registers."""

    def __init__(self, operands):
        self.registers = {f"${i}": np.asarray(x, dtype=np.uint32) for i, x in enumerate(operands) if x is not None}

    def run(self, text):
        for line in text.strip().strip("{}").split(";"):
            words = line.replace(",", " ").split()
            if words and words[0] != ".reg":
                name, target, *sources = words
                self.registers[target] = np.asarray(self._compute(name, *map(self._value, sources)), dtype=np.uint32)
        return self

    def _value(self, name):
        return np.uint32(int(name, 0) & 0xFFFFFFFF) if name[0] in "-0123456789" else self.registers[name]

    def _compute(self, name, *sources):
        name = name.removesuffix(".b32").removesuffix(".u32")
        if name.endswith(".f16x2"):
            return self._halves(name, *sources)
        if name == "prmt":
            low, high, selector = (np.uint64(x) for x in sources)
            packed = low | high << np.uint64(32)
            result = np.uint64(0)
            for byte in range(4):
                nibble = selector >> np.uint64(4 * byte) & np.uint64(15)
                value = packed >> np.uint64(8) * (nibble & np.uint64(7)) & np.uint64(255)
                sign = np.uint64(255) * (value >> np.uint64(7))
                result = result | np.where(nibble > 7, sign, value) << np.uint64(8 * byte)
            return result
        if name == "lop3":
            *operands, table = sources
            minterms = [i for i in range(8) if int(table) >> i & 1]
            chosen = [[x if i >> 2 - j & 1 else ~x for j, x in enumerate(operands)] for i in minterms]
            return np.bitwise_or.reduce([np.bitwise_and.reduce(np.broadcast_arrays(*terms)) for terms in chosen])
        a, *rest = (np.asarray(x, dtype=np.uint64) for x in sources)
        b = rest[0] if rest else None
        compute = {
            "mov": lambda: a,
            "not": lambda: ~a,
            "and": lambda: a & b,
            "or": lambda: a | b,
            "xor": lambda: a ^ b,
            "shl": lambda: a << b,
            "shr": lambda: a >> b,
            "mul.hi": lambda: a * b >> np.uint64(32),
        }[name]
        return compute() & np.uint64(0xFFFFFFFF)

    def _halves(self, name, *sources):
        results = []
        for shift in (0, 16):
            a, b, *c = ((x >> shift & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float64) for x in sources)
            exact = a + b if name == "add.rn.f16x2" else a * b + (c[0] if c else 0)
            if ".sat." in name:
                exact = np.clip(exact, 0, 1)
            results.append(exact.astype(np.float16).view(np.uint16).astype(np.uint32))
        return results[0] | results[1] << 16

    def halves(self, names):
        """The float16 pairs of registers, [pairs, 2, ...]."""
        registers = [self.registers[name] for name in names]
        return np.stack(
            [np.stack([(x >> s & 0xFFFF).astype(np.uint16).view(np.float16) for s in (0, 16)]) for x in registers]
        )


def random_codes(bits, count, seed):
    """Codes [count, 8] in which every code is at every place."""
    random = np.random.default_rng(seed)
    codes = np.stack([np.concatenate([random.permutation(2**bits) for _ in range(8)]) for _ in range(8)], axis=1)
    return codes[:count]


def code_words(codes, bits):
    """Codes [count, 8] to the words that a look-up takes."""
    shifts = np.arange(4, dtype=np.uint32) * 8
    even, odd = codes[:, ::2].astype(np.uint32), codes[:, 1::2].astype(np.uint32)
    if bits <= 4:
        return [((even | odd << 4) << shifts).sum(1, dtype=np.uint32)]
    return [(x << shifts).sum(1, dtype=np.uint32) for x in (even, odd)]


def table_operands(table, copies):
    return [np.uint32(x & 0xFFFFFFFF) for x in table for _ in range(copies)]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_key_assembly_looks_every_code_up_in_its_order(head_dim, bits):
    found, codes = key_lookup(head_dim, bits), random_codes(bits, 256, 1)
    words = [word for word in code_words(codes, bits) for _ in range(4)]
    operands = [None] * 2 + words + table_operands(found.table, 4)
    assert found.constraints.count("=r") == 2
    assert found.constraints.count(",") + 1 == len(operands)
    (numbers,) = found.groups
    assert_looked_up(Ptx(operands).run(found.asm), ("$0", "$1"), numbers, grid_codebook(head_dim, bits), codes)


def assert_looked_up(machine, outputs, numbers, book, codes):
    shifts = np.arange(4, dtype=np.uint32) * 8
    found = np.concatenate([machine.registers[name][:, None] >> shifts & 255 for name in outputs], axis=1)
    found = found.astype(np.uint8).view(np.int8).astype(np.float64)
    assert sorted(numbers.order) == list(range(8))
    expected = book.centroids_by_code.numpy()[codes][:, list(numbers.order)]
    np.testing.assert_allclose((found + numbers.offset) * numbers.unit, expected, rtol=1e-12)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("bits", SPLIT_BITS)
def test_split_key_assembly_looks_both_halves_up(head_dim, bits):
    found = split_key_lookup(head_dim, bits)
    first, second = (random_codes(width, 256, seed) for seed, width in enumerate((bits + 1, bits - 1)))
    first, second = (np.resize(codes, (256, 8)) for codes in (first, second))
    if bits == 3:
        words = [*code_words(first, 4), *code_words(second, 2)]
    else:
        words = code_words(first | second << bits + 1, 2 * bits)
    operands = [None] * 4 + [word for word in words for _ in range(4)] + table_operands(found.table, 4)
    assert found.constraints.count("=r") == 4
    assert found.constraints.count(",") + 1 == len(operands)
    machine = Ptx(operands).run(found.asm)
    for i, (codes, width) in enumerate(((first, bits + 1), (second, bits - 1))):
        book = grid_codebook(head_dim // 2, width)
        assert_looked_up(machine, (f"${2 * i}", f"${2 * i + 1}"), found.groups[i], book, codes)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_value_assembly_pairs_the_same_code_of_two_tokens(head_dim, bits):
    found, codes = value_lookup(head_dim, bits), [random_codes(bits, 256, seed) for seed in (2, 3)]
    words = [word for token in codes for word in code_words(token, bits) for _ in range(2)]
    operands = [None] * 8 + words + table_operands(found.table, 2)
    assert found.constraints.count("=r") == 8
    assert found.constraints.count(",") + 1 == len(operands)
    pairs = Ptx(operands).run(found.asm).halves([f"${i}" for i in range(8)]).astype(np.float64)
    (numbers,) = found.groups
    assert sorted(numbers.order) == list(range(8))
    # Subnormal: no exponent but that of zero.
    assert np.abs(pairs).max() < 2.0**-14
    for token in range(2):
        expected = grid_codebook(head_dim, bits).centroids_by_code.numpy()[codes[token]][:, list(numbers.order)]
        np.testing.assert_allclose(pairs[:, token].T * numbers.unit, expected, rtol=1e-12)


@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 2**-11), ("int8", 0.501 / 127 / 254), ("fp8", 2**-8)])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("bits", BITS)
def test_parts_add_up_to_the_centroids(head_dim, bits, kind, tolerance):
    table = entries(head_dim, bits, kind, CPU).double()
    total = table[0] if kind == "float16" else table[0] + table[1] * PARTS[kind].low_unit
    centroids = torch.from_numpy(unit_variance_centroids(head_dim, bits))
    found = total * entry_unit(head_dim, bits, kind)
    # A part of fp8 is relative to the centroid, one of int8 to the largest.
    size = centroids.abs().max() if kind == "int8" else centroids.abs()
    assert ((found - centroids).abs() <= tolerance * size).all()
    ascending = total[ascending_codes(bits)]
    torch.testing.assert_close(ascending, -ascending.flip(0), rtol=0, atol=0)
    if kind != "float16":
        assert table[0].abs().max() == PARTS[kind].full
        assert table.dtype == torch.float64
        assert entries(head_dim, bits, kind, CPU).dtype == PARTS[kind].dtype


@pytest.mark.parametrize("kind", ["float16", "int8", "fp8"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_permute_assembly_looks_every_code_up(kind, bits):
    table, words = entries(128, bits, kind, CPU), entry_words(128, bits, kind, CPU)
    assert words.dtype == torch.int32
    assert words.shape == (8,)
    operands = [np.uint32(x & 0xFFFFFFFF) for x in words.tolist()]
    codes = random_codes(bits, 64, 4)[:, :4]
    packed = (codes.astype(np.uint32) << np.arange(4, dtype=np.uint32) * 8).sum(1, dtype=np.uint32)
    if kind == "float16":
        scalars = [x for x in operands for _ in range(4)]
        machine = Ptx([None, None, packed, *scalars]).run(portable_lookup._HALF_ASM)
        found = machine.halves(["$0", "$1"]).reshape(4, -1).T
        np.testing.assert_array_equal(found, table[0].numpy()[codes])
        return
    for part in range(2):
        scalars = [x for x in operands[4 * part : 4 * part + 4] for _ in range(4)]
        result = Ptx([None, packed, *scalars]).run(portable_lookup._BYTE_ASM).registers["$0"]
        found = result[:, None] >> np.arange(4, dtype=np.uint32) * 8 & 255
        np.testing.assert_array_equal(found, table[part].view(torch.uint8).numpy()[codes])


def orders(head_dim):
    """The orders of channels of every operand."""
    for bits in BITS:
        yield key_channels(head_dim, key_lookup(head_dim, bits).groups[0])
        yield value_channels(head_dim, bits)
    for bits in SPLIT_BITS:
        for numbers in split_key_lookup(head_dim, bits).groups:
            yield key_channels(head_dim // 2, numbers)


@pytest.mark.parametrize("order", [order for head_dim in (64, 128, 256) for order in orders(head_dim)])
def test_operands_permute_the_bits_of_channels(order):
    head_dim, count = len(order), len(order).bit_length() - 1
    # A dimension for every bit, the highest first.
    moved = np.arange(head_dim).reshape([2] * count)
    for swap in bit_swaps(order):
        moved = moved.swapaxes(*(count - 1 - bit for bit in swap))
    assert moved.ravel().tolist() == list(order)


# --------------------------------------------------------------------------------------------------------- schedule


@triton.jit
def _schedule_kernel(starts, owners, num_workers, num_tiles, size: tl.constexpr):
    index = tl.arange(0, size)
    tl.store(starts + index, share_start(index, num_workers, num_tiles))
    tl.store(owners + index, owner(index, num_workers, num_tiles))


WORKERS_AND_TILES = [*product((1, 2, 3, 7, 16, 63), (0, 1, 2, 6, 7, 8, 50, 63)), (5, 13), (10, 20), (33, 62)]


@pytest.mark.parametrize(("num_workers", "num_tiles"), WORKERS_AND_TILES)
def test_shares_are_even_and_every_tile_has_its_owner(device, num_workers, num_tiles):
    starts, owners = (torch.full((64,), -1, dtype=torch.int32, device=device) for _ in range(2))
    _schedule_kernel[(1,)](starts, owners, num_workers, num_tiles, 64)
    shares = list(pairwise(starts[: num_workers + 1].tolist()))
    assert shares[0][0] == 0
    assert shares[-1][1] == num_tiles
    sizes = [end - begin for begin, end in shares]
    assert min(sizes) >= 0
    assert max(sizes) - min(sizes) <= 1
    expected = [worker for worker, size in enumerate(sizes) for _ in range(size)]
    assert owners[:num_tiles].tolist() == expected


@triton.jit
def _query_heads_kernel(
    found, query_start_loc, batch, num_heads, num_tokens, query_len, group: tl.constexpr, size: tl.constexpr
):
    index = tl.arange(0, size)
    row, head, column, token, used = query_heads(index, query_start_loc, batch, num_heads, num_tokens, query_len, group)
    tl.store(found + index, row)
    tl.store(found + size + index, head)
    tl.store(found + 2 * size + index, column)
    tl.store(found + 3 * size + index, token)
    tl.store(found + 4 * size + index, used.to(tl.int64))


@pytest.mark.parametrize("row_lens", [(2, 2, 2), (1, 0, 3, 2), (0, 0, 1)])
@pytest.mark.parametrize(("num_heads", "group"), [(4, 2), (3, 3), (5, 1)])
def test_every_query_head_is_visited_once(device, row_lens, num_heads, group):
    even = len(set(row_lens)) == 1
    start_loc = torch.tensor((0, *row_lens), device=device).cumsum(0, dtype=torch.int32)
    found = torch.empty(5, 64, dtype=torch.int64, device=device)
    arguments = (len(row_lens), num_heads, sum(row_lens), max(row_lens), group, 64)
    _query_heads_kernel[(1,)](found, None if even else start_loc, *arguments)
    visited = sorted(tuple(x[:4]) for x in found.T.tolist() if x[4])
    starts = start_loc.tolist()
    assert visited == sorted(
        (row, head, token * group + head % group, starts[row] + token)
        for row, row_len in enumerate(row_lens)
        for token in range(row_len)
        for head in range(num_heads)
    )


@triton.jit
def _cu_tiles_kernel(
    cu_tiles, start_loc, lens, starts, ends, batch, num_tokens, query_len, tile: tl.constexpr, window: tl.constexpr
):
    _write_cu_tiles(cu_tiles, start_loc, lens, starts, ends, batch, num_tokens, query_len, 200, tile, window, 16)


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("window", [0, 1, 20, 100])
@pytest.mark.parametrize("row_lens", [None, (1, 3, 2, 1, 0, 4, 2, 1, 3)])
@pytest.mark.parametrize(("padded", "ended"), [(False, False), (True, False), (False, True), (True, True)])
def test_only_tiles_that_are_seen_count(device, tile, window, row_lens, padded, ended):
    lens = [0, 3, 16, 64, 65, 200, 129, 1, 90]
    starts = [0, 1, 15, 63, 65, 90, 200, 0, 17] if padded else [0] * len(lens)
    last_ends = [5, -2, 16, 63, 64, 130, 100, 2**31 - 1, 20] if ended else lens
    start_loc = None if row_lens is None else torch.tensor((0, *row_lens)).cumsum(0, dtype=torch.int32).to(device)
    cu_tiles = torch.full((len(lens) + 1,), -1, dtype=torch.int32, device=device)
    int32 = [torch.tensor(x, dtype=torch.int32, device=device) for x in (lens, starts, last_ends)]
    counts = row_lens or [2] * len(lens)
    _cu_tiles_kernel[(1,)](
        cu_tiles, start_loc, int32[0], int32[1] if padded else None, int32[2] if ended else None, len(lens),
        sum(counts), max(counts), tile, window,
    )  # fmt: skip
    expected = []
    for length, start, last_end, row_len in zip(lens, starts, last_ends, counts, strict=True):
        ends = [length - row_len + token + 1 for token in range(row_len)]
        seen = {
            position // tile
            for end in ends
            for position in range(max(start, end - window if window else 0, 0), max(min(end, last_end), 0))
        }
        expected.append(len(seen))
    counts = cu_tiles.diff().tolist()
    # Rows shorter than their query tokens may count a tile that only the first position is in.
    assert cu_tiles[0] == 0
    assert all(count == want or (want == 0 and count <= 1) for count, want in zip(counts, expected, strict=True))
    assert counts[0] == 0


# ----------------------------------------------------------------------------------------------------------- launch

CARDS = [Card((9, 0), 132), Card((8, 0), 108), Card((8, 6), 84), Card((7, 5), 40), Card((0, 0), 2)]


@pytest.mark.parametrize("choose", [fragment_launch, portable_launch])
@pytest.mark.parametrize("max_row_tokens", [16, 8192])
@pytest.mark.parametrize("num_columns", [1, 4, 20])
def test_every_batch_launches_the_kernels_of_a_representative(choose, max_row_tokens, num_columns):
    def launch_of(batch):
        return choose(DecodeShape(batch, 8, 128, 4, 4, num_columns, batch * max_row_tokens), Card((9, 0), 132))

    def kernels(batch):
        return replace(launch_of(batch), num_workers=0), padded_batch(batch)

    representatives = representative_batches(launch_of, 300)
    assert {kernels(batch) for batch in range(1, 301)} == {kernels(batch) for batch in representatives}
    assert len({kernels(batch) for batch in representatives}) == len(representatives) < 15


@pytest.mark.parametrize("choose", [fragment_launch, portable_launch])
@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=lambda shape: shape.name)
def test_launches_fit_the_shape(choose, shape):
    group = shape.num_heads // shape.num_kv_heads
    for card, batch, query_len, context in product(CARDS, (1, 2, 7, 64, 256), (1, 4, 8), (16, 1000, 131072)):
        columns = group * query_len
        decode = DecodeShape(batch, shape.num_kv_heads, shape.head_dim, 4, 4, columns, batch * context)
        launch = choose(decode, card)
        assert launch == choose(decode, card)
        assert launch.padded_columns % launch.columns == 0
        assert 0 <= launch.padded_columns - columns < launch.columns
        sizes = vars(launch).keys() - {"padded_columns", "num_workers", "max_registers", "overlap"}
        powers = [getattr(launch, name) for name in sizes]
        assert all(x > 0 and x & (x - 1) == 0 for x in powers)
        assert launch.tile % 16 == 0
        if choose is fragment_launch:
            assert launch.columns >= 4
            assert launch.merge_slots >= launch.merge_warps
        else:
            # tl.dot takes no dimension under 16, and a program that merges one head does without.
            assert launch.columns >= 16
            assert launch.prepare_heads >= 16
            assert launch.merge_heads == 1 or launch.merge_heads >= 16
        most_tiles = batch * (-(-context // launch.tile) + 1)
        assert 1 <= launch.num_workers <= most_tiles
        # The instructions that wait for the kernel before came with sm_90.
        assert card.capability >= (9, 0) or not launch.overlap
        programs = shape.num_kv_heads * launch.padded_columns // launch.columns
        assert launch.num_workers == 1 or launch.num_workers * programs <= 32 * card.num_multiprocessors


def test_long_rows_fill_the_card():
    card = Card((9, 0), 132)
    for choose in (fragment_launch, portable_launch):
        launch = choose(DecodeShape(1, 8, 128, 4, 4, 4, 131072), card)
        assert launch.num_workers * 8 > 2 * card.num_multiprocessors


def forced(inputs, path, **changes):
    """Output and log-sum-exp of a launch with some sizes changed."""
    case, layout = inputs.case, inputs.case.layout
    options = inputs.reference_options()
    columns = case.num_heads // case.num_kv_heads * options["query_len"]
    tokens = len(case.seq_lens) * inputs.block_table.shape[1] * case.block_size
    bits = (case.key_bits, case.value_bits)
    shape = DecodeShape(len(case.seq_lens), case.num_kv_heads, case.head_dim, *bits, columns, tokens)
    launch = find_path(path, PATHS).launch_of(shape, card_of(inputs.query.device))
    launch = replace(launch, **changes)
    launch = replace(launch, padded_columns=-(-columns // launch.columns) * launch.columns)
    out = torch.full_like(inputs.query, torch.nan)
    lse = torch.full(inputs.query.shape[:2], torch.nan, device=out.device)
    planned = {name: options.pop(name) for name in ("query_len", "scale", "window", "softcap")}
    arguments = (inputs.query, inputs.pages, inputs.block_table)
    attention = plan(*arguments, layout, find_path(path, PATHS), launch, batch=len(inputs.seq_lens), **planned)
    attention(*arguments, inputs.seq_lens, out=out, lse=lse, **options)
    return out, lse


LAUNCH_CASES = {
    "rows": DecodeCase(seq_lens=(70, 0, 200, 3, 64), query_lens=(1, 2, 3, 1, 0), num_heads=8),
    "window": DecodeCase(
        seq_lens=(70, 150, 0, 300), query_lens=4, num_heads=10, num_kv_heads=2, window=90, sinks=True, key_mean=True,
        seq_starts=(10, 0, 0, 250), seq_ends=(64, 100, 3, 290), softcap=3.0,
    ),
}  # fmt: skip
CHANGES = [
    *({"num_workers": n} for n in (1, 2, 7, 64)),
    *({"tile": n, "num_workers": 5} for n in (16, 32, 64)),
    {"columns": 32},
]
PORTABLE_CHANGES = [
    *({"merge_heads": heads, "merge_slots": slots, "num_workers": 9} for heads in (1, 16) for slots in (1, 2, 4)),
    {"merge_heads": 16, "merge_slots": 3, "num_workers": 9},
    *({"prepare_heads": heads, "prepare_positions": n} for heads, n in ((16, 128), (64, 16))),
]
FRAGMENT_CHANGES = [
    *({"stages": n} for n in (2, 3, 4)),
    *({"merge_warps": warps, "merge_slots": n, "num_workers": 9} for warps, n in ((1, 1), (1, 4), (2, 32), (8, 64))),
]


@pytest.mark.parametrize("changes", [*CHANGES, *PORTABLE_CHANGES, *FRAGMENT_CHANGES], ids=str)
@pytest.mark.parametrize("name", LAUNCH_CASES)
def test_how_work_is_shared_does_not_matter(device, name, changes):
    inputs = build(LAUNCH_CASES[name], device)
    expected, expected_lse = inputs.exact()
    names = ["portable"] if device.type == "cpu" else ["fragment", "fp16", "int8", "fp8", "portable"]
    for path in names:
        if changes in (PORTABLE_CHANGES if path == "fragment" else FRAGMENT_CHANGES):
            continue
        if find_path(path, PATHS).obstacle(inputs.case.layout, device) is None:
            own = {"columns": 16} if path == "fragment" and "columns" in changes else changes
            out, lse = forced(inputs, path, **own)
            assert relative_error(out, expected) < 2e-3
            torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=4e-3)


def test_the_interpreter_s_card_is_small():
    assert card_of(CPU) == Card((0, 0), 2)


# ----------------------------------------------------------------------------------------------------- path choice

LAYOUT = KVCacheLayout(TurboQuantConfig(128), 2, 16)
GPU = torch.device("cuda", 0)


def chosen(name, *arguments):
    path = choose_path(name, *arguments)
    return "reference" if path is None else path.name


@pytest.fixture
def card(monkeypatch):
    """Pretends that a card is there."""

    def pretend(capability, hip=None):
        monkeypatch.setattr(_path, "interpreting", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", hip)

    return pretend


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), "portable"), ((7, 5), "fp16"), ((8, 0), "fragment"), ((8, 9), "fragment"), ((12, 0), "fragment")],
)
def test_auto_takes_the_fastest_that_the_card_can_run(card, capability, expected):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.ampere")
    card(capability)
    assert chosen("auto", LAYOUT, GPU) == expected


def test_auto_minds_the_layout(card):
    card((9, 0))
    assert chosen("auto", KVCacheLayout(TurboQuantConfig(96), 2, 16), GPU) == "fp16"
    assert chosen("auto", KVCacheLayout(TurboQuantConfig(128), 2, 24), GPU) == "fp16"


def test_auto_is_portable_on_amd(card):
    card((9, 4), hip="6.4")
    assert chosen("auto", LAYOUT, GPU) == "portable"


@pytest.mark.usefixtures("looks_for_gluon")
def test_auto_does_without_gluon(card, monkeypatch):
    card((9, 0))
    monkeypatch.setattr(_dispatch, "find_spec", lambda name: None)
    assert chosen("auto", LAYOUT, GPU) == "fp16"


@pytest.mark.parametrize("missing", ["triton.experimental", "triton.experimental.gluon"])
@pytest.mark.usefixtures("looks_for_gluon")
def test_auto_does_without_the_package_that_gluon_would_be_in(card, monkeypatch, missing):
    """Triton before 3.4, which torch 2.6 brings, has neither: find_spec raises when a parent is missing."""
    card((9, 0))
    for name in [name for name in sys.modules if name.startswith(missing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert chosen("auto", LAYOUT, GPU) == "fp16"


@pytest.mark.parametrize("path", ["auto", "fragment", "fp16", "int8", "fp8", "portable", "reference"])
def test_names_mean_themselves(card, path):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.ampere")
    card((9, 0))
    assert chosen(path, LAYOUT, GPU) == ("fragment" if path == "auto" else path)
    if path in ("auto", "reference"):
        assert chosen(path, LAYOUT, CPU) == "reference"
    else:
        with pytest.raises(ValueError, match=rf"path is '{path}', which cannot run here: the tensors are on cpu"):
            chosen(path, LAYOUT, CPU)


@pytest.mark.parametrize(
    ("path", "capability", "layout", "hip", "message"),
    [
        ("fragment", (7, 5), LAYOUT, None, "the card is sm_75, and it needs sm_80"),
        ("fp16", (7, 0), LAYOUT, None, "the card is sm_70, and it needs sm_75"),
        ("int8", (7, 0), LAYOUT, None, "the card is sm_70, and it needs sm_75"),
        ("fp8", (8, 6), LAYOUT, None, "the card is sm_86, and it needs sm_89"),
        ("fp16", (9, 4), LAYOUT, "6.4", "its instructions are NVIDIA's"),
        (
            "fragment",
            (9, 0),
            KVCacheLayout(TurboQuantConfig(96), 1, 16),
            None,
            "head_dim is 96, and it takes 64, 128, 256",
        ),
        ("fragment", (9, 0), KVCacheLayout(TurboQuantConfig(64), 1, 24), None, "block_size is 24, .* multiples of 16"),
    ],
)
def test_what_cannot_run_is_refused(card, path, capability, layout, hip, message):
    card(capability, hip)
    with pytest.raises(ValueError, match=rf"path is '{path}', which cannot run here: {message}. Use path='auto'"):
        chosen(path, layout, GPU)


def test_other_head_dims_take_the_next_path(card):
    card((9, 0))
    for head_dim in (8, 72, 80, 160, 192, 504, 512):
        assert chosen("auto", KVCacheLayout(TurboQuantConfig(head_dim), 1, 16), GPU) == "fp16"


@pytest.mark.usefixtures("looks_for_gluon")
def test_fragments_without_gluon_are_refused(card, monkeypatch):
    card((9, 0))
    monkeypatch.setattr(_dispatch, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"this Triton has no Gluon for sm_80; 3\.6 has"):
        chosen("fragment", LAYOUT, GPU)


def test_fragments_have_no_interpreter(monkeypatch):
    monkeypatch.setattr(_path, "interpreting", lambda: True)
    with pytest.raises(ValueError, match="path is 'fragment', which cannot run here: Gluon has no interpreter"):
        chosen("fragment", LAYOUT, CPU)
    assert chosen("int8", LAYOUT, CPU) == "int8"


# ----------------------------------------------------------------------------------------------- compiled fragments

# The kernel's arguments are those that the launch passes, so they need no list here.
COMPILE = """
import os
from pathlib import Path
os.environ.pop("TRITON_INTERPRET", None)
import torch
from turboquant_core.ops.decode_attention.fragment import launch as module
from turboquant_core.ops.decode_attention.call import AttendCall
from turboquant_core.ops.decode_attention.fragment.sizes import fragment_launch
from turboquant_core.ops.decode_attention.launch import Attention
from turboquant_core.ops._card import Card
from turboquant_core.ops.decode_attention.sizes import DecodeShape
from turboquant_core.testing.compiled import Recorder
from turboquant_core.testing.decode import DecodeCase, build

def report(arch, case, folder):
    columns, batch = case.num_heads // case.num_kv_heads * max(case.row_lens), len(case.seq_lens)
    bits = (case.key_bits, case.value_bits)
    shape = DecodeShape(batch, case.num_kv_heads, case.head_dim, *bits, columns, 10**6)
    launch = fragment_launch(shape, Card(divmod(arch, 10), 132))
    inputs, layout = build(case, torch.device("cpu")), case.layout
    module.fragment_kernel = recorder = Recorder(module.fragment_kernel)
    call = AttendCall.of(
        inputs.query, inputs.pages, inputs.block_table, layout, launch, batch=batch, query_len=max(case.row_lens),
        scale=1.0, window=case.window or 0, softcap=case.softcap or 0.0,
    )
    module.combine_kernel = combine = Recorder(module.combine_kernel)
    Attention(call, module.plan(call))(
        inputs.query, inputs.pages, inputs.block_table, inputs.seq_lens, out=inputs.query, lse=None,
        sinks=None,
        **{name: inputs.options[name] for name in ("query_start_loc", "seq_starts", "seq_ends", "key_transform")},
    )
    compiled = recorder.compile(arch, Path(folder))
    buffers = getattr(launch, "stages", 0) * launch.tile * layout.slot_bytes
    products = compiled.ptx.count("mma.sync")
    print(
        products, compiled.shared_bytes, buffers, compiled.registers, compiled.stack_bytes, launch.tile, columns,
        combine.compile(arch, Path(folder)).stack_bytes,
    )
"""
COMPILED = {
    **{f"4 bits on sm_{arch}": (arch, DecodeCase(seq_lens=(40, 40))) for arch in (80, 89, 90, 100, 120)},
    **{
        f"split {bits} bits on sm_{arch}": (arch, DecodeCase(128, bits, 4, True, seq_lens=(40, 40), key_scale=True))
        for arch, bits in ((80, 2), (90, 4), (120, 3))
    },
    "8 and 4 bits, contiguous": (90, DecodeCase(128, 8, 4, seq_lens=(40, 40), paged=False)),
    "3 bits, all options": (80, replace(LAUNCH_CASES["window"], head_dim=64, key_bits=3, value_bits=3, num_heads=4)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_fragments_compile_and_keep_to_registers(run_python, monkeypatch, tmp_path, name):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.ampere")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arch, case = COMPILED[name]
    printed = run_python(f"{COMPILE}\nreport({arch}, {case}, {str(tmp_path)!r})").split()
    products, shared, buffers, registers, stack, tile, columns, combine_stack = map(int, printed)
    # Of every sixteen tokens, at least a product of keys for every four queries and 32 channels, and one of values for
    # every eight queries and sixteen channels.
    of_keys = case.head_dim // 32 * -(-columns // 4)
    assert products >= (tile // 16) * (of_keys + case.head_dim // 16 * -(-columns // 8))
    # What a row keeps while its tiles are attended may lie there, and nothing that its tiles need.
    assert stack < 128, f"{registers} registers do not suffice"
    # Beside tiles that are loaded ahead only a query passes through shared memory, its parts of a byte each.
    assert shared <= buffers + 2 * columns * case.head_dim
    assert combine_stack == 0


COMPILED_FOR = """
import os
os.environ.pop("TRITON_INTERPRET", None)
from dataclasses import replace
import torch
from turboquant_core.key_transform import IDENTITY
from turboquant_core.ops.decode_attention import launch as decode
from turboquant_core.ops.decode_attention.fragment import launch as fragment
from turboquant_core.ops.decode_attention.paths import PATHS
from turboquant_core.ops.decode_attention.portable import launch as portable
from turboquant_core.testing.compiled import Recorder, signature
from turboquant_core.testing.decode import DecodeCase

kernels = []
for module in (decode, fragment, portable):
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        kernels.append(Recorder(getattr(module, name)))
        setattr(module, name, kernels[-1])
layout = DecodeCase().layout
for path in (path for path in PATHS if path.name in ("fragment", "fp16")):
    for batch, blocks in ((2, 16), (3, 1), (16, 17), (17, 32), (32, 100)):
        query, lengths = torch.zeros(batch, 4, 128), torch.zeros(batch, dtype=torch.int32)
        pages, table = layout.allocate(blocks), torch.zeros(batch, blocks, dtype=torch.int32)
        launch = replace(decode.choose_launch(path, layout, 2, 4, 256, query.device), num_workers=batch)
        options = dict(query_len=1, scale=1.0, window=0, softcap=0.0)
        decode.plan(query, pages, table, layout, path, launch, batch=batch, **options)(
            query, pages, table, lengths, query_start_loc=None, seq_starts=None, seq_ends=None, sinks=None,
            key_transform=IDENTITY, out=torch.empty_like(query), lse=None,
        )
        print(path.name, [signature(kernel.kernel, kernel.arguments) for kernel in kernels if kernel.arguments])
"""


def test_batches_of_one_size_share_their_kernels(run_python):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.ampere")
    printed = run_python(COMPILED_FOR).splitlines()
    assert len(printed) == 10
    assert len(set(printed)) == 2


@pytest.mark.parametrize(("padding", "path"), [(0, "fragment"), (16, "fragment"), (8, "fp16")])
def test_fragments_want_aligned_pages(card, padding, path):
    pytest.importorskip("triton.experimental.gluon.language.nvidia.ampere")
    card((9, 0))
    pages = torch.zeros(3, LAYOUT.num_kv_heads, LAYOUT.head_bytes + padding, dtype=torch.uint8)[
        ..., : LAYOUT.head_bytes
    ]
    assert LAYOUT.head_bytes % 16 == 0
    assert chosen("auto", LAYOUT, GPU, pages) == path
    if path != "fragment":
        with pytest.raises(ValueError, match="it takes multiples of 16 bytes"):
            chosen("fragment", LAYOUT, GPU, pages)
