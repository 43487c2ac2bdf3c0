"""Attention on dense raw tokens, merged with attention on codes. `test_raw_copies.py` has that on copies."""

import pytest
import torch

from turboquant_core.ops.merge_attention import reference

pytest.importorskip("triton")

from turboquant_core.ops.merge_attention import launch
from turboquant_core.ops.merge_attention.sizes import MAX_COLUMNS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, HEADS, KV_HEADS = 2, 6, 3
MERGES = [launch.merge_attention, reference.merge_attention]


def arguments(query_len, head_dim, num_seen, dtype, *, same_for_rows=False, num_heads=HEADS):
    """Query, what attention on codes gave, and raw tokens, of which nobody sees the one after `num_seen`."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    num_tokens = ROWS * query_len
    # What a model passes is part of a larger tensor.
    query = draw(num_tokens, num_heads + 4, head_dim).to(DEVICE, dtype)[:, 2:-2]
    out, lse = draw(num_tokens, num_heads, head_dim).to(DEVICE, dtype), draw(num_tokens, num_heads) * 3
    # No codes at all.
    out[0, 0], lse[0, 0] = 0.0, -torch.inf
    seen = draw(1 if same_for_rows else ROWS, query_len, num_seen) < 0.5
    seen[..., 0] = True
    raw = [draw(ROWS, KV_HEADS, num_seen + 1, head_dim).to(DEVICE, dtype) for _ in range(2)]
    for states in raw:
        states[:, :, -1] = torch.nan
    return query, out, lse.to(DEVICE), *raw, seen.to(DEVICE)


def exact(query, out, lse, keys, values, seen, *, scale, softcap):
    """The same in float64, one token and head at a time."""
    query, out, lse, keys, values = (x.double() for x in (query, out, lse, keys, values))
    group = query.shape[1] // KV_HEADS
    outputs, sums = out.clone(), lse.clone()
    for token in range(len(query)):
        row, number = divmod(token, seen.shape[1])
        visible = seen.expand(ROWS, -1, -1)[row, number].nonzero()[:, 0]
        for head in range(query.shape[1]):
            key, value = (x[row, head // group, visible] for x in (keys, values))
            logits = key @ query[token, head] * scale
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            logits = torch.cat([logits, lse[token, head, None]])
            outputs[token, head] = logits.softmax(0) @ torch.cat([value, out[token, head, None]])
            sums[token, head] = logits.logsumexp(0)
    return outputs, sums


def assert_merges(merge, given, tolerance, **options):
    query, out, lse, *raw = given
    expected, expected_lse = exact(*given, **options)
    found, found_lse = out.clone(), lse.clone()
    merge(query, found, found_lse, *raw, **options)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found_lse.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("num_seen", [1, MAX_COLUMNS, 2 * MAX_COLUMNS + 9])
@pytest.mark.parametrize(("query_len", "head_dim"), [(1, 64), (5, 80), (16, 96), (3, 8)])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_one_softmax_over_raw_tokens_and_codes(merge, num_seen, query_len, head_dim, softcap):
    given = arguments(query_len, head_dim, num_seen, torch.float32, same_for_rows=softcap > 0)
    assert_merges(merge, given, 1e-5, scale=0.3, softcap=softcap)


@pytest.mark.parametrize("merge", MERGES)
def test_large_softcaps_and_logits_do_not_overflow(merge):
    assert_merges(merge, arguments(1, 64, 40, torch.float32), 1e-4, scale=300.0, softcap=30.0)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_other_types_lose_what_rounding_the_output_does(merge, dtype, tolerance):
    assert_merges(merge, arguments(3, 112, 50, dtype), 1.01 * tolerance, scale=112**-0.5, softcap=0.0)


@pytest.mark.parametrize("merge", MERGES)
def test_a_query_of_another_type_than_raw_tokens(merge):
    query, *rest = arguments(3, 64, 20, torch.float32)
    assert_merges(merge, (query.bfloat16(), *rest), 1e-5, scale=0.125, softcap=0.0)


@pytest.mark.parametrize("merge", MERGES)
def test_more_query_heads_than_a_program_takes(merge):
    given = arguments(5, 64, 20, torch.float32, num_heads=13 * KV_HEADS)
    assert_merges(merge, given, 1e-5, scale=0.125, softcap=0.0)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("lse", [0.5, -torch.inf], ids=["codes", "nothing"])
def test_where_no_raw_token_is_seen_all_stays(merge, lse):
    query, out, sums, *raw = arguments(2, 64, 20, torch.float32)
    raw[-1][:] = False
    sums[:] = lse
    left = out.clone(), sums.clone()
    if lse < 0:
        left[0][:] = 0.0
    found = left[0].clone(), left[1].clone()
    merge(query, *found, *raw, scale=1.0, softcap=0.0)
    for one, other in zip(found, left, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("which", ["keys", "values"])
@pytest.mark.parametrize("has_codes", [True, False])
def test_a_raw_token_that_is_no_number_is_carried_into_its_own_row_and_head(merge, bad, which, has_codes):
    query, out, lse, keys, values, seen = arguments(2, 64, 2 * MAX_COLUMNS, torch.float32)
    {"keys": keys, "values": values}[which][1, 1, MAX_COLUMNS + 3, 5] = bad
    seen[1, :, MAX_COLUMNS + 3] = True
    query[..., 5] = query[..., 5].abs() + 1
    if not has_codes:
        out[:], lse[:] = 0.0, -torch.inf
    merge(query, out, lse, keys, values, seen, scale=0.125, softcap=0.0)
    group = HEADS // KV_HEADS
    carried = ~out.isfinite().all(-1)
    expected = torch.zeros(2 * ROWS, HEADS, dtype=torch.bool, device=DEVICE)
    expected[2:, group : 2 * group] = True
    assert torch.equal(carried, expected)


LAUNCHES = """
import os
os.environ.pop("TRITON_INTERPRET", None)
import torch
from turboquant_core.ops.merge_attention import launch
from turboquant_core.testing.compiled import Recorder, signature

launch.merge_kernel = kernel = Recorder(launch.merge_kernel)
compiled = set()
for rows, query_len, num_tables in ((1, 1, 1), (1, 3, 1), (5, 1, 5), (5, 4, 1), (16, 2, 16)):
    query, raw = torch.zeros(rows * query_len, 8, 64), torch.zeros(rows, 2, 18, 64)
    seen = torch.zeros(num_tables, query_len, 17, dtype=torch.bool)
    launch.merge_attention(query, query, query[..., 0].contiguous(), raw, raw, seen, scale=0.1, softcap=0.0)
    compiled.add(repr(signature(kernel.kernel, kernel.arguments)))
print(len(compiled))
"""


def test_other_rows_and_lengths_compile_nothing_new(run_python):
    assert int(run_python(LAUNCHES)) == 1
