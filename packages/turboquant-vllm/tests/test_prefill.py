"""Prefill over stored context against exact attention on the same context."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from turboquant_core import KVCacheLayout, Rotation, TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_core.ops import _values, cache_gather, cache_update
from turboquant_core.ops.raw_copies import CopyTable, copy_update
from turboquant_core.raw_copies import CopyColumns, CopyRows, RawCopies
from turboquant_vllm import impl
from turboquant_vllm.batch import prefill_rows
from turboquant_vllm.batch.prefill_rows import PrefillRows
from turboquant_vllm.dense_attention import DenseAttention
from turboquant_vllm.prefill import attention as prefill
from turboquant_vllm.prefill.attention import Prefill
from turboquant_vllm.prefill.context_codes import attend_on_codes
from turboquant_vllm.prefill.raw_context import RawContext
from turboquant_vllm.workspace import workspace_tokens

BLOCK_SIZE = 16


@dataclass(frozen=True)
class Case:
    context_lens: tuple[int, ...] = (0, 70, 5)
    query_lens: tuple[int, ...] = (20, 33, 1)
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 128
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    centred: bool = True
    # Whether channels of keys were scaled and put in another order, too.
    scaled: bool = False
    copies: CopyColumns | None = None
    most_grouped_tokens: int = 0
    # Whether another layer stored the rows' own keys and values, and they are given to this one no more.
    shares: bool = False

    @property
    def scale(self):
        """Not what kernels take where they are told none."""
        return 0.8 * self.head_dim**-0.5


CASES = {
    "mixed": Case(),
    "no context": Case(context_lens=(0, 0, 0)),
    "context everywhere": Case(context_lens=(100, 17, 64)),
    "not centred": Case(centred=False),
    "scaled": Case(scaled=True),
    "scaled, on codes": Case(scaled=True, context_lens=(100, 17, 64), most_grouped_tokens=20),
    "scaled, shared, softcap, window": Case(scaled=True, shares=True, softcap=2.0, window=24),
    "window": Case(window=24),
    "window within the chunk": Case(window=3),
    "softcap": Case(softcap=2.0),
    "sinks": Case(sinks=True),
    "sinks and window": Case(sinks=True, window=24),
    "softcap and window": Case(softcap=2.0, window=24),
    "head_dim 64": Case(head_dim=64, num_heads=9, num_kv_heads=3),
    "shared": Case(shares=True),
    "shared, no context": Case(context_lens=(0, 0, 0), shares=True),
    "shared, softcap": Case(softcap=2.0, shares=True),
    "shared, window": Case(window=24, shares=True),
    "shared, window, no context": Case(context_lens=(0, 0, 0), window=24, shares=True),
    "head_dim 512": Case(head_dim=512, num_heads=4, num_kv_heads=2, shares=True),
    "one row": Case(context_lens=(300,), query_lens=(40,)),
    "on codes": Case(context_lens=(100, 17, 64), most_grouped_tokens=64),
    "on codes, without a mean": Case(centred=False, most_grouped_tokens=64),
    "some on codes": Case(context_lens=(100, 17, 64), most_grouped_tokens=20),
    "on codes, softcap": Case(softcap=2.0, most_grouped_tokens=64),
    "on codes, sinks": Case(sinks=True, most_grouped_tokens=64),
    "on codes, window": Case(window=24, most_grouped_tokens=64),
    **{
        f"copies, {name}": Case(**options, copies=CopyColumns(1, 6))
        for name, options in {
            "dense": {},
            "not centred": {"centred": False},
            "softcap": {"softcap": 2.0},
            "window": {"window": 24},
            "shared, window": {"window": 24, "shares": True},
            "on codes": {"most_grouped_tokens": 64},
            "some on codes": {"context_lens": (100, 17, 64), "most_grouped_tokens": 20},
        }.items()
    },
    "on codes, groups of three heads": Case(head_dim=64, num_heads=9, num_kv_heads=3, most_grouped_tokens=64),
}


def flash_version(device, case):
    if device.type == "cpu":
        return None
    from turboquant_vllm._compat.flash import flash_version

    version = flash_version(case.head_dim, case.sinks)
    if version == 4:
        pytest.importorskip("cutlass", reason="FlashAttention 4 is written in cutlass")
    return version


@pytest.fixture(autouse=True)
def every_number_fits(monkeypatch):
    """Operations look at the values of what they are given, and attention at the lengths that a GPU's kernels need."""
    attend = DenseAttention.__call__

    def checked(self, query, key, value, query_start_loc, key_start_loc, max_query_len, max_key_len, **options):
        assert max_query_len == query_start_loc.diff().max()
        assert max_key_len == key_start_loc.diff().max()
        return attend(self, query, key, value, query_start_loc, key_start_loc, max_query_len, max_key_len, **options)

    monkeypatch.setattr(DenseAttention, "__call__", checked)
    monkeypatch.setenv(_values.VARIABLE, "1")
    _values._asked_for.cache_clear()
    yield
    monkeypatch.undo()
    _values._asked_for.cache_clear()


class Inputs:
    """Random vectors with large key means, stored up to the end of every row."""

    def __init__(self, case, device, dtype=torch.bfloat16):
        self.case, self.dtype = case, dtype
        generator = torch.Generator().manual_seed(0)
        total, d = sum(case.context_lens) + sum(case.query_lens), case.head_dim

        def draw(*shape):
            return torch.randn(*shape, generator=generator).to(device, self.dtype)

        offset = 4 * draw(case.num_kv_heads, d)
        self.keys = draw(total, case.num_kv_heads, d) + offset
        self.values = draw(total, case.num_kv_heads, d)
        self.queries = draw(sum(case.query_lens), case.num_heads, d)
        self.transform = KeyTransform(offset.float() if case.centred else None, *self._scale_and_order())
        self.layout = KVCacheLayout(TurboQuantConfig(d, 4, 4), case.num_kv_heads, BLOCK_SIZE)
        lens = [c + q for c, q in zip(case.context_lens, case.query_lens, strict=True)]
        width = -(-max(lens) // BLOCK_SIZE)
        blocks = torch.randperm(len(lens) * width + 2, generator=generator)[: len(lens) * width]
        self.table = blocks.view(len(lens), width).to(device, torch.int32)
        self.pages = torch.full(
            (len(blocks) + 2, case.num_kv_heads, self.layout.head_bytes), 255, dtype=torch.uint8, device=device
        )
        slots, self.own, start = [], [], 0
        for row, length in enumerate(lens):
            position = torch.arange(length, device=device)
            slots.append(self.table[row, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE)
            self.own += range(start + case.context_lens[row], start + length)
            start += length
        cache_update(self.keys, self.values, self.pages, torch.cat(slots), self.layout, key_transform=self.transform)
        self.sinks = draw(case.num_heads) if case.sinks else None
        self.raw = self._raw_context(lens) if case.copies else None
        query_lens = torch.tensor(case.query_lens, device=device)
        self.rows = PrefillRows(
            num_tokens=sum(case.query_lens),
            max_query_len=max(case.query_lens),
            query_start_loc=torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).int(),
            context_lens=torch.tensor(case.context_lens, dtype=torch.int32, device=device),
            context_lens_cpu=list(case.context_lens),
            query_lens_cpu=list(case.query_lens),
            block_table=self.table,
            copies=None if self.raw is None else self.raw.rows,
            most_grouped_tokens=case.most_grouped_tokens,
        )

    def _raw_context(self, lens):
        """Copies of what the step before left: first and newest tokens of every context."""
        device, columns = self.queries.device, self.case.copies
        table = CopyTable(
            columns, num_slots=len(self.pages) * BLOCK_SIZE, num_copies=100, max_rows=len(lens), device=device
        )
        copies = RawCopies.allocate(self.layout.config, self.case.num_kv_heads, 100, self.dtype, device)
        both = self.case.context_lens, self.case.query_lens
        context, own = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in both)
        for seq_lens, query_lens in ((context, context), (context + own, own)):
            start_loc = torch.nn.functional.pad(query_lens.cumsum(0), (1, 0)).int()
            sizes = {"num_tokens": int(start_loc[-1]), "max_query_len": int(query_lens.max())}
            entries = table.assign(seq_lens, start_loc, self.table, BLOCK_SIZE)
            rows = CopyRows(columns, entries, seq_lens, start_loc, self.table, **sizes)
            keys, values = self.keys, self.values
            new = (keys[self.own], values[self.own])
            if query_lens is context:
                before = torch.ones(len(keys), dtype=torch.bool, device=device)
                before[self.own] = False
                new = (keys[before], values[before])
            codes = copy_update(new, self.pages, rows, copies, self.layout, reads_new=False)
        return RawContext(rows, copies, codes)

    def _scale_and_order(self):
        if not self.case.scaled:
            return None, None
        shape = (2, self.case.num_kv_heads, self.case.head_dim)
        scale, order = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.keys.device)
        return (scale / 2).exp(), order.argsort(-1)

    def attend(self):
        case = self.case
        attention = DenseAttention(case.scale, case.window, case.softcap, flash_version(self.queries.device, case))
        out = torch.full_like(self.queries, math.nan)
        own = None if case.shares else (self.keys[self.own], self.values[self.own])
        prefill_layer = Prefill(attention, self.layout, self.sinks)
        prefill_layer(self.queries, own, self.pages, self.rows, self.transform, out, self.raw)
        return out

    def exact(self, dtype=torch.float64):
        """Attention on what is stored of the context and on the rows' own keys and values, as a window has them."""
        case, outputs, first = self.case, [], 0
        starts = torch.zeros(1, dtype=torch.int32, device=self.queries.device)
        rotation = Rotation(case.head_dim).matrix.to(self.queries.device)
        for row, (context, own) in enumerate(zip(case.context_lens, case.query_lens, strict=True)):
            length = context + own
            lens = torch.full_like(starts, length)
            key, value, _ = cache_gather(
                self.pages, self.table[row : row + 1], lens, self.layout, dtype=torch.float32, max_tokens=length
            )
            key, value = self.transform.restored(key.double() @ rotation), value.double() @ rotation
            if case.copies is not None:
                first_token = sum(case.context_lens[:row]) + sum(case.query_lens[:row])
                newest = range(max(context - case.copies.num_before, 0), context)
                raw = sorted({*range(min(case.copies.sink_tokens, context)), *newest})
                picked = [first_token + position for position in raw]
                key[raw], value[raw] = self.keys[picked].double(), self.values[picked].double()
            if not case.shares:
                picked = self.own[first : first + own]
                key[context:], value[context:] = self.keys[picked].double(), self.values[picked].double()
            group = case.num_heads // case.num_kv_heads
            q = self.queries[first : first + own].to(dtype).transpose(0, 1)
            k, v = (x.to(dtype).transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
            logits = (q @ k.transpose(1, 2)).to(torch.promote_types(dtype, torch.float32)) * case.scale
            if case.softcap:
                logits = case.softcap * (logits / case.softcap).tanh()
            position = torch.arange(length, device=q.device)
            behind = position[context:, None] - position
            logits = logits.masked_fill((behind < 0) | (behind >= (case.window or length)), -math.inf)
            if self.sinks is not None:
                logits = torch.cat([logits, self.sinks.to(logits)[:, None, None].expand(-1, own, 1)], dim=-1)
            weights = logits.softmax(-1)[..., :length].to(dtype)
            outputs.append((weights @ v).transpose(0, 1))
            first += own
        return torch.cat(outputs).double()


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def assert_accurate(inputs):
    """About as accurate as a low-precision eager attention, which has no rotated query and keys to round."""
    exact = inputs.exact()
    bound = 1e-5
    if inputs.dtype == torch.bfloat16:
        factor = 1.25 if inputs.case.window is None else 1.75
        bound = factor * relative_error(inputs.exact(inputs.dtype), exact)
    assert relative_error(inputs.attend(), exact) <= bound


@pytest.mark.parametrize("name", CASES)
def test_prefill_is_attention_on_stored_context_and_own_tokens(device, name):
    assert_accurate(Inputs(CASES[name], device))


@pytest.mark.parametrize("name", CASES)
def test_prefill_on_a_cpu_in_float32(name):
    assert_accurate(Inputs(CASES[name], torch.device("cpu"), torch.float32))


def test_attention_on_codes_makes_nothing_on_the_default_device(device):
    inputs = Inputs(CASES["on codes"], device)
    arguments = inputs.queries, inputs.pages, inputs.rows.groups, inputs.layout
    options = {"scale": inputs.case.scale, "softcap": None, "key_transform": inputs.transform}
    expected = attend_on_codes(*arguments, **options)
    with torch.device("meta"):
        found = attend_on_codes(*arguments, **options)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("workspace", [3, 48, 1000])
def test_the_size_of_the_workspace_does_not_matter(device, workspace):
    inputs = Inputs(Case(context_lens=(100, 0, 64)), device)
    inputs.rows.workspace_tokens = workspace
    assert len(inputs.rows.context_parts) == -(-100 // max(1, workspace // 2))
    assert all(part.num_tokens <= max(workspace, 2) for part in inputs.rows.context_parts)
    assert_accurate(inputs)


@pytest.mark.parametrize(("workspace", "calls"), [(1, 3), (57, 2), (80, 2), (100, 1), (1000, 1)])
def test_windows_of_many_rows_are_dequantised_a_few_rows_at_a_time(device, workspace, calls):
    inputs = Inputs(Case(context_lens=(100, 0, 64), window=24), device)
    inputs.rows.workspace_tokens = workspace
    parts = inputs.rows.window_parts(24)
    assert len(parts) == calls
    assert sum(part.reached.num_tokens for part in parts) == 23 + 20 + 33 + 23 + 1
    assert all(part.reached.num_tokens <= workspace or len(part.rows.query_lens_cpu) == 1 for part in parts)
    for part in parts:
        assert part.tokens.stop - part.tokens.start == part.rows.num_tokens
        assert part.rows.context_lens_cpu == part.rows.context_lens.tolist()
        assert part.reached.start_loc[-1] == part.reached.num_tokens
    assert len(parts) > 1 or parts[0].rows is inputs.rows
    assert_accurate(inputs)


@pytest.mark.parametrize("workspace", [1, 57])
def test_windows_of_a_few_rows_at_a_time_have_the_copies_of_those(device, workspace):
    inputs = Inputs(Case(context_lens=(100, 0, 64), window=24, copies=CopyColumns(1, 6)), device)
    inputs.rows.workspace_tokens = workspace
    assert len(inputs.rows.window_parts(24)) > 1
    assert_accurate(inputs)


def test_the_workspace_is_bounded_in_bytes():
    llama, one_head_each = ((2048, heads, 128, torch.bfloat16) for heads in (8, 32))
    assert workspace_tokens(*llama) == 16 * 2048
    assert workspace_tokens(*one_head_each) == 4 * 2048
    assert workspace_tokens(2048, 128, 256, torch.bfloat16) == 2048
    assert workspace_tokens(2048, 12, 128, torch.bfloat16) == 10 * 2048
    assert workspace_tokens(65536, 8, 128, torch.bfloat16) == 128 * 1024


def test_rows_do_not_see_each_other(device):
    inputs = Inputs(Case(), device)
    alone = Inputs(Case(), device)
    alone.values[: sum(inputs.case.query_lens[:1])] = math.nan
    out = alone.attend()
    expected = inputs.attend()
    assert out[:20].isnan().all()
    torch.testing.assert_close(out[20:], expected[20:], rtol=0, atol=0)


@pytest.mark.parametrize("most_grouped_tokens", [0, 64])
def test_rows_of_few_tokens_dequantise_nothing(device, most_grouped_tokens):
    rows = Inputs(Case(context_lens=(100, 17, 0), most_grouped_tokens=most_grouped_tokens), device).rows
    assert bool(rows.groups) is (most_grouped_tokens > 0)
    assert bool(rows.context_parts) is (most_grouped_tokens == 0)


def test_a_batch_of_too_many_groups_is_dequantised(device, monkeypatch):
    monkeypatch.setattr(prefill_rows, "GROUP_COUNTS", (4, 8))
    rows = Inputs(Case(context_lens=(100, 17, 64), most_grouped_tokens=64), device).rows
    assert rows.groups is None
    assert sum(part.num_tokens for part in rows.context_parts) == 181


def test_groups_are_filled_up_to_a_number_that_is_compiled(device, monkeypatch):
    monkeypatch.setattr(prefill_rows, "GROUP_COUNTS", (4, 16))
    inputs = Inputs(Case(context_lens=(100, 17, 64), most_grouped_tokens=64), device)
    assert inputs.rows.groups.seq_lens.tolist() == [100] * 3 + [17] * 5 + [64] + [0] * 7
    assert_accurate(inputs)


def unattending(head_dim):
    """Prefill of a layer, for what it does around its attention."""
    layout = KVCacheLayout(TurboQuantConfig(head_dim), 4, BLOCK_SIZE)
    return Prefill(DenseAttention(1.0, None, None, None), layout, None)


@pytest.mark.parametrize(("head_dim", "dtype", "exact"), [(128, torch.bfloat16, True), (80, torch.bfloat16, False)])
def test_a_rotation_that_a_type_holds_is_one_product_of_that_type(monkeypatch, head_dim, dtype, exact):
    assert (prefill._exact_matrix(Rotation(head_dim), dtype, torch.device("cpu")) is not None) is exact
    vectors = torch.randn(50, 4, head_dim).to(dtype)
    one = unattending(head_dim)
    expected = Rotation(head_dim).rotate(vectors).to(dtype)
    if exact:
        for slower in ("rotate", "unrotate"):
            monkeypatch.delattr(Rotation, slower)
    # Sums in another order round to the same number of the type, or to the next.
    torch.testing.assert_close(one._rotated(vectors), expected, rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(one._unrotated(expected), vectors, rtol=2**-5, atol=2**-5)


def test_everything_is_made_where_the_query_is(monkeypatch):
    vectors = torch.empty(50, 4, 128, dtype=torch.bfloat16, device="meta")
    matrix = Mock(wraps=prefill._exact_matrix)
    monkeypatch.setattr(prefill, "_exact_matrix", matrix)
    for rotate in (unattending(128)._rotated, unattending(128)._unrotated):
        rotate(vectors)
        matrix.assert_called_with(Rotation(128), vectors.dtype, vectors.device)
    assert prefill_rows._to_device(torch.arange(3), vectors.device).is_meta


def test_nothing_waits_for_a_plan_to_reach_a_gpu():
    plan, device = Mock(), torch.device("cuda")
    prefill_rows._to_device(plan, device)
    plan.pin_memory().to.assert_called_once_with(device, non_blocking=True)


@pytest.mark.parametrize(("case", "added"), [(Case(), False), (Case(softcap=2.0), True), (Case(sinks=True), True)])
def test_the_mean_is_added_where_it_changes_something(device, monkeypatch, case, added):
    inputs, gather = Inputs(case, device), Mock(wraps=cache_gather)
    monkeypatch.setattr(prefill, "cache_gather", gather)
    inputs.attend()
    assert gather.called
    assert all((call.kwargs["key_transform"].mean is not None) is added for call in gather.call_args_list)


@pytest.mark.parametrize(
    ("target", "given", "is_read"), [(None, True, True), ("other", True, False), ("other", False, False)]
)
def test_a_layer_that_shares_a_cache_reads_no_keys_of_its_own(monkeypatch, target, given, is_read):
    attend = Mock()
    monkeypatch.setattr(impl, "Prefill", Mock(return_value=attend))
    layer = SimpleNamespace(
        _shares_with=target,
        _pages=lambda kv_cache: (kv_cache, None),
        dense_attention=None,
        sinks=None,
        key_transform=SimpleNamespace(settled=None),
    )
    query, key = torch.empty(3, 4, 64), torch.empty(3, 2, 64)
    metadata = SimpleNamespace(decode=None, prefill=SimpleNamespace(num_tokens=3, copies=None))
    own = (key, key) if given else (None, None)
    impl.TurboQuantImpl.forward(layer, None, query, *own, torch.empty(0), metadata, torch.empty_like(query))
    assert (attend.call_args.args[1] is not None) is is_read
