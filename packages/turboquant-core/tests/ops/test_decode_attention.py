import math
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.ops.cache_update import cache_update
from turboquant_core.ops.decode_attention import decode_attention
from turboquant_core.ops.decode_attention.paths import PATHS
from turboquant_core.testing import MODEL_SHAPES
from turboquant_core.testing.decode import DecodeCase, build, relative_error

# The interpreter computes in NumPy, which warns of the logarithm of zero.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

CUDA = torch.cuda.is_available()
BITS = (2, 3, 4, 5, 6, 8)
ALL_PAIRS = [(key_bits, value_bits) for key_bits in BITS for value_bits in BITS]
# Every width of a key and of a value; the interpreter is slow.
FEW_PAIRS = [(2, 8), (3, 4), (4, 3), (4, 4), (5, 2), (6, 5), (8, 6)]

ALL_AT_ONCE = DecodeCase(
    seq_lens=(70, 100, 0, 66),
    query_lens=(1, 3, 2, 0),
    num_heads=8,
    num_kv_heads=2,
    seq_starts=(3, 70, 0, 0),
    seq_ends=(60, 90, 4, 66),
    window=50,
    softcap=3.0,
    sinks=True,
    key_mean=True,
)
TRANSFORMED = replace(ALL_AT_ONCE, key_scale=True, key_channel_order=True)
CASES = {
    "lengths about a page": DecodeCase(seq_lens=(0, 1, 15, 16, 17, 31), num_heads=2),
    "lengths about a tile": DecodeCase(seq_lens=(63, 64, 65, 0, 129), num_heads=2),
    "pages of 32": DecodeCase(seq_lens=(31, 32, 33, 0), block_size=32, num_heads=2),
    "pages of 64": DecodeCase(seq_lens=(63, 65), block_size=64, num_heads=2),
    "pages of 128": DecodeCase(seq_lens=(127, 129), block_size=128, num_heads=2),
    "group 1": DecodeCase(seq_lens=(40, 7), num_heads=3, num_kv_heads=3),
    "group 2, 2 tokens": DecodeCase(seq_lens=(40, 2), query_lens=2, num_heads=4, num_kv_heads=2),
    "group 4, 3 tokens": DecodeCase(seq_lens=(64, 66), query_lens=3),
    "group 7, 4 tokens": DecodeCase(seq_lens=(65, 20), query_lens=4, num_heads=14, num_kv_heads=2),
    "group 8, 5 tokens": DecodeCase(seq_lens=(16, 30), query_lens=5, num_heads=8),
    "group 16, 8 tokens": DecodeCase(64, seq_lens=(68,), query_lens=8, num_heads=16),
    "group 3, 7 tokens": DecodeCase(seq_lens=(70, 7), query_lens=7, num_heads=3),
    "group 4, 16 tokens": DecodeCase(64, seq_lens=(40, 90), query_lens=(16, 9)),
    "6 tokens, group 1": DecodeCase(256, seq_lens=(34, 6), query_lens=6, num_heads=1),
    "rows shorter than their tokens": DecodeCase(seq_lens=(0, 2, 5), query_lens=3),
    "tokens by row": DecodeCase(seq_lens=(20, 70, 64, 3, 0), query_lens=(1, 0, 5, 3, 0)),
    "first rows without tokens": DecodeCase(seq_lens=(90, 40, 30), query_lens=(0, 0, 2)),
    "contiguous": DecodeCase(seq_lens=(40, 0, 33, 70), query_lens=2, paged=False),
    "contiguous and full": DecodeCase(seq_lens=(80, 1, 79), paged=False, num_heads=2),
    "window": DecodeCase(seq_lens=(10, 64, 65, 150, 0), window=64),
    "window of 1": DecodeCase(seq_lens=(65, 40), window=1, query_lens=2),
    "window under the tokens": DecodeCase(seq_lens=(66, 70), window=3, query_lens=5),
    "window, contiguous": DecodeCase(seq_lens=(30, 150), window=20, query_lens=2, paged=False),
    "softcap": DecodeCase(seq_lens=(70, 5), softcap=0.5),
    "scale": DecodeCase(seq_lens=(70, 5), scale=0.5),
    "negative scale": DecodeCase(seq_lens=(70, 5), scale=-0.2),
    "scale 0": DecodeCase(seq_lens=(70, 5), scale=0.0),
    "sinks": DecodeCase(seq_lens=(70, 0, 3), sinks=True, query_lens=2, num_heads=8, num_kv_heads=2),
    "mean": DecodeCase(seq_lens=(70, 0, 3), key_mean=True, num_heads=8, num_kv_heads=2),
    "mean and sinks": DecodeCase(seq_lens=(70, 0, 3), key_mean=True, sinks=True, query_lens=(2, 1, 3)),
    "mean and softcap": DecodeCase(seq_lens=(70, 0, 3), key_mean=True, softcap=2.0, num_heads=8, num_kv_heads=2),
    "key scale": DecodeCase(seq_lens=(70, 0, 3), key_scale=True, query_lens=2, num_heads=8, num_kv_heads=2),
    "key order": DecodeCase(seq_lens=(70, 0, 3), key_channel_order=True, query_lens=2, num_heads=8, num_kv_heads=2),
    **{
        f"split {bits} bits at {head_dim}": DecodeCase(
            head_dim, bits, 6 - bits, True, seq_lens=(70, 0, 33), query_lens=2, num_heads=8, num_kv_heads=2
        )
        for bits, head_dim in ((2, 64), (3, 128), (4, 256))
    },
    "split, with a transform and all else": replace(TRANSFORMED, key_split=True),
    "split, contiguous": DecodeCase(80, 3, key_split=True, seq_lens=(80, 1, 79), paged=False, num_heads=2),
    "split, 16 tokens": DecodeCase(64, key_split=True, seq_lens=(40, 90), query_lens=(16, 9)),
    "key scale, order and mean, all at once": TRANSFORMED,
    "left padding": DecodeCase(seq_lens=(70, 20, 66), seq_starts=(65, 0, 30), query_lens=2),
    "rows that see nothing": DecodeCase(seq_lens=(70, 40, 40), seq_starts=(70, 100, 39), query_lens=3),
    "ends about a tile": DecodeCase(seq_lens=(200,) * 6, seq_ends=(63, 64, 65, 0, 200, 500), num_heads=2),
    "ends among the tokens": DecodeCase(seq_lens=(66, 70, 40), seq_ends=(65, 68, 39), query_lens=(3, 5, 1)),
    "ends and a window": DecodeCase(seq_lens=(150, 150, 70), seq_ends=(130, 100, -5), window=40, query_lens=2),
    "ends and sinks": DecodeCase(seq_lens=(70, 3, 40), seq_ends=(33, 0, -1), sinks=True, query_lens=2),
    "ends, contiguous": DecodeCase(seq_lens=(80, 33, 79), seq_ends=(64, 20, 17), query_lens=2, paged=False),
    "ends at the starts and before": DecodeCase(seq_lens=(70, 70, 70), seq_starts=(30, 65, 5), seq_ends=(20, 65, 40)),
    "all at once": ALL_AT_ONCE,
}


def kernels(case):
    """The kernels that can run a case here."""
    device = torch.device("cuda" if CUDA else "cpu")
    return [path.name for path in PATHS if path.obstacle(case.layout, device) is None]


def by_kernel(cases):
    return [pytest.param(case, path, id=f"{name}-{path}") for name, case in cases.items() for path in kernels(case)]


@contextmanager
def memory_of_nan():
    """What torch.empty gives is NaN, and the largest integer."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def attend(inputs, path, **changes):
    """Output and log-sum-exp."""
    arguments = (inputs.query, inputs.pages, inputs.block_table, inputs.seq_lens, inputs.case.layout)
    with memory_of_nan():
        return decode_attention(*arguments, path=path, return_lse=True, **(inputs.options | changes))


def assert_accurate(inputs, path, out, lse):
    """Closer to float64 than a bfloat16 model's attention on the same keys and values."""
    expected, expected_lse = inputs.exact()
    assert relative_error(out, expected) <= relative_error(inputs.eager_bfloat16(), expected)
    assert_lse(lse, expected_lse, path)


def assert_lse(lse, expected, path):
    assert lse.dtype == torch.float32
    assert torch.equal(lse.isneginf(), expected.isneginf())
    seen = ~expected.isneginf()
    # Two e4m3 parts hold a factor to seven bits; rounding logits to bfloat16 costs up to 4e-3.
    rtol, atol = (3e-3, 1.5e-2) if path == "fp8" else (1e-3, 5e-3)
    torch.testing.assert_close(lse[seen].double(), expected[seen], rtol=rtol, atol=atol)


@pytest.mark.parametrize(("case", "path"), by_kernel(CASES))
def test_every_option_is_more_accurate_than_eager_bfloat16(device, case, path):
    inputs = build(case, device)
    assert_accurate(inputs, path, *attend(inputs, path))


@pytest.mark.parametrize(
    ("case", "path"),
    by_kernel(
        {
            f"{head_dim}, {key_bits} and {value_bits} bits": DecodeCase(
                head_dim, key_bits, value_bits, seq_lens=(70, 17), query_lens=2, num_heads=2
            )
            for head_dim in ((64, 80, 96, 128, 192, 256) if CUDA else (128,))
            for key_bits, value_bits in (ALL_PAIRS if CUDA else FEW_PAIRS)
        }
    ),
)
def test_every_width_is_more_accurate_than_eager_bfloat16(device, case, path):
    inputs = build(case, device)
    assert_accurate(inputs, path, *attend(inputs, path))


HEAD_DIMS = [
    (8, 6, 4), (64, 3, 2), (72, 4, 5), (80, 5, 4), (96, 2, 3), (160, 3, 4), (192, 4, 6), (256, 8, 5), (512, 4, 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "path"),
    by_kernel({f"{head_dim}": DecodeCase(head_dim, *bits, seq_lens=(34, 5)) for head_dim, *bits in HEAD_DIMS}),
)
def test_every_head_dim_is_more_accurate_than_eager_bfloat16(device, case, path):
    inputs = build(case, device)
    assert_accurate(inputs, path, *attend(inputs, path))


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=lambda shape: shape.name)
def test_shapes_of_real_models(device, shape):
    heads = {"num_heads": shape.num_heads, "num_kv_heads": shape.num_kv_heads}
    case = DecodeCase(shape.head_dim, **heads, seq_lens=(33,), dtype=torch.float16)
    inputs = build(case, device)
    for path in kernels(case) if CUDA else ["portable"]:
        assert_accurate(inputs, path, *attend(inputs, path))


@pytest.mark.skipif(not CUDA, reason="the interpreter takes minutes for a long row")
@pytest.mark.parametrize(
    ("case", "path"),
    by_kernel(
        {
            "one": DecodeCase(seq_lens=(131072,), num_heads=8, num_kv_heads=2),
            "uneven": DecodeCase(seq_lens=(3, 131072, 0, 5000) * 4, query_lens=2, num_heads=8, num_kv_heads=2),
            "many": DecodeCase(64, seq_lens=tuple(range(0, 4000, 16)), num_heads=8, num_kv_heads=2, window=1000),
        }
    ),
)
def test_long_rows_and_many_rows(device, case, path):
    inputs = build(case, device)
    assert_accurate(inputs, path, *attend(inputs, path))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("path", kernels(DecodeCase()))
def test_the_output_has_the_query_s_type(device, path, dtype):
    inputs = build(DecodeCase(seq_lens=(70, 17), query_lens=2, dtype=dtype), device)
    out, lse = attend(inputs, path)
    assert out.dtype == dtype
    assert_accurate(inputs, path, out, lse)


@pytest.mark.parametrize("path", kernels(DecodeCase()))
@pytest.mark.parametrize("size", [2**-6, 2**6])
def test_lengths_of_values_may_differ_by_thousands(device, path, size):
    """Weights times value scales are float16, which ends at 65504 and at 2^-24."""
    inputs = build(DecodeCase(seq_lens=(100,)), device)
    scales = inputs.case.layout.views(inputs.pages).value_scales
    sign = 2 * torch.randint(2, scales.shape, generator=torch.Generator().manual_seed(1)).to(device) - 1
    scales *= size * 8.0**sign  # roots of the lengths
    assert_accurate(inputs, path, *attend(inputs, path))


@pytest.mark.parametrize("path", kernels(DecodeCase()))
def test_logits_of_hundreds(device, path):
    inputs = build(DecodeCase(seq_lens=(100, 130), scale=10.0), device)
    assert inputs.exact()[1].abs().max() > 200
    assert_accurate(inputs, path, *attend(inputs, path))


@pytest.mark.parametrize("path", [*kernels(DecodeCase()), "reference"])
@pytest.mark.parametrize("zeros", [slice(0, 4), slice(4, 8), slice(0, 12), slice(4, 5)])
def test_keys_and_values_of_zero(device, path, zeros):
    inputs = build(DecodeCase(seq_lens=(192, 192)), device)
    views = inputs.case.layout.views(inputs.pages)
    views.value_scales[inputs.block_table[0, zeros].long()] = 0
    views.key_scales[inputs.block_table[1, zeros].long()] = 0
    out, lse = attend(inputs, path)
    expected, expected_lse = inputs.exact()
    assert (out - expected).norm() < 2e-3 * expected.norm()
    assert_lse(lse, expected_lse, path)


@pytest.mark.parametrize("path", [*kernels(DecodeCase()), "reference"])
@pytest.mark.parametrize("field", ["key_scales", "value_scales"])
def test_a_stored_nan_is_carried_into_its_own_row_and_head(device, path, field):
    inputs = build(DecodeCase(seq_lens=(40, 40), num_kv_heads=2), device)
    getattr(inputs.case.layout.views(inputs.pages), field)[inputs.block_table[1, 1].long(), 1, 3] = math.nan
    out, _ = attend(inputs, path)
    assert out[1, 2:].isnan().all()
    assert out[0].isfinite().all()
    assert out[1, :2].isfinite().all()


@pytest.mark.parametrize("path", [*kernels(DecodeCase()), "reference"])
def test_only_the_product_of_query_and_scale_matters(device, path):
    inputs = build(DecodeCase(seq_lens=(40, 70)), device)
    expected, _ = attend(inputs, path)
    for size in (2.0**-30, 2.0**30):
        out, _ = attend(replace(inputs, query=inputs.query * size), path, scale=128**-0.5 / size)
        assert relative_error(out, expected) < 1e-6
    without = replace(inputs, query=0 * inputs.query)
    out, lse = attend(without, path)
    assert relative_error(out, without.exact()[0]) < 1e-3
    torch.testing.assert_close(lse, inputs.seq_lens.log()[:, None].expand_as(lse))


@pytest.mark.parametrize("path", [*kernels(DecodeCase()), "reference"])
@pytest.mark.parametrize("case", [DecodeCase(seq_lens=(0, 0), sinks=sinks) for sinks in (False, True)])
def test_rows_without_tokens_give_zeros(device, path, case):
    inputs = build(case, device)
    out, lse = attend(inputs, path)
    assert (out == 0).all()
    expected = inputs.options["sinks"].expand(2, -1) if case.sinks else torch.full_like(lse, -torch.inf)
    torch.testing.assert_close(lse, expected)


@pytest.mark.parametrize("path", [*kernels(DecodeCase()), "reference"])
@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (0, 2)])
def test_no_tokens_give_nothing(device, path, tokens, rows):
    layout = KVCacheLayout(TurboQuantConfig(64), 2, 16)
    query, table = torch.ones(tokens, 4, 64, device=device), torch.zeros(rows, 1, dtype=torch.int32, device=device)
    lens = torch.zeros(rows, dtype=torch.int32, device=device)
    out, lse = decode_attention(query, layout.allocate(1, device), table, lens, layout, return_lse=True, path=path)
    assert out.shape == (0, 4, 64)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize("name", CASES)
def test_reference_is_attention_on_dequantised_keys_and_values(device, name):
    inputs = build(CASES[name], device)
    expected = inputs.eager(lambda x: x)
    exact, _ = inputs.exact()
    assert relative_error(exact, expected) < 1e-12
    out, _ = attend(inputs, "reference")
    assert relative_error(out, exact) < 1e-5


@pytest.mark.parametrize("path", [*kernels(DecodeCase(key_bits=8, value_bits=8)), "reference"])
@pytest.mark.parametrize("centred", [False, True])
def test_eight_bits_give_the_attention_of_what_was_stored(device, path, centred):
    layout = KVCacheLayout(TurboQuantConfig(128, 8, 8), 2, 16)
    generator = torch.Generator().manual_seed(7)
    key, value, query = (torch.randn(40, heads, 128, generator=generator).to(device) for heads in (2, 2, 4))
    mean = 2 * torch.randn(2, 128, generator=generator).to(device) if centred else None
    if centred:
        key = key + mean
    pages, table = layout.allocate(4, device), torch.tensor([[3, 0, 2]], dtype=torch.int32, device=device)
    token = torch.arange(40, device=device)
    cache_update(
        key, value, pages, table[0].long()[token // 16] * 16 + token % 16, layout, key_transform=KeyTransform(mean)
    )
    lens = torch.tensor([40], dtype=torch.int32, device=device)
    out, lse = decode_attention(
        query[-1:],
        pages,
        table,
        lens,
        layout,
        key_transform=KeyTransform(mean),
        sinks=query[0, :, 0].clone(),
        return_lse=True,
        path=path,
    )
    scores = torch.einsum("hd,thd->ht", query[-1], key.repeat_interleave(2, dim=1)) / math.sqrt(128)
    scores = torch.cat([scores, query[0, :, :1]], dim=1)
    expected = torch.einsum("ht,thd->hd", scores.softmax(-1)[:, :-1], value.repeat_interleave(2, dim=1))
    assert relative_error(out[0], expected) < 0.02
    torch.testing.assert_close(lse[0], scores.logsumexp(-1), rtol=0, atol=0.02)


@pytest.mark.parametrize("path", [*kernels(DecodeCase()), "reference"])
def test_a_key_mean_moves_the_log_sum_exp_alone(device, path):
    inputs = build(DecodeCase(seq_lens=(70, 3), query_lens=2, num_heads=8, num_kv_heads=2, key_mean=True), device)
    out, lse = attend(inputs, path)
    out_centred, lse_centred = attend(inputs, path, key_transform=IDENTITY)
    torch.testing.assert_close(out, out_centred, rtol=1e-4, atol=1e-5)
    mean = inputs.options["key_transform"].mean.repeat_interleave(4, dim=0)
    torch.testing.assert_close(lse - lse_centred, (inputs.query * mean).sum(-1) / math.sqrt(128), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", [*kernels(DecodeCase()), "reference"])
@pytest.mark.parametrize("options", [{}, {"window": 50, "key_mean": True}, {"softcap": 2.0}], ids=str)
def test_attention_on_parts_merges_into_attention_on_all(device, path, options):
    case = DecodeCase(seq_lens=(150, 70, 33, 130), query_lens=(1, 3, 2, 1), num_heads=8, num_kv_heads=2, **options)
    inputs = build(case, device)
    first, second = (torch.tensor(x, dtype=torch.int32, device=device) for x in ((20, 0, 5, 64), (110, 68, 5, 128)))
    ranges = ((None, first), (first, second), (second, None))
    parts = [attend(inputs, path, seq_starts=start, seq_ends=end) for start, end in ranges]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    lse = lses.logsumexp(0)
    expected, expected_lse = attend(inputs, path)
    assert relative_error(((lses - lse).exp()[..., None] * outs).sum(0), expected) < 1e-3
    torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


EVERYTHING = CASES["all at once"]


@pytest.mark.parametrize("path", [*kernels(DecodeCase()), "reference"])
@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"sinks": True}, {}])
def test_rows_may_have_means_of_their_own(device, path, options):
    case = DecodeCase(seq_lens=(70, 0, 3), query_lens=2, num_heads=8, num_kv_heads=2, key_mean=True, **options)
    inputs = build(case, device)
    means = torch.stack([inputs.options["key_transform"].mean * factor for factor in (1, 3, -2)])
    out, lse = attend(inputs, path, key_transform=KeyTransform(means))
    for row in range(3):
        expected, expected_lse = attend(inputs, path, key_transform=KeyTransform(means[row]))
        tokens = slice(2 * row, 2 * row + 2)
        assert torch.equal(out[tokens], expected[tokens])
        assert torch.equal(lse[tokens], expected_lse[tokens])


@pytest.mark.parametrize("path", [*kernels(EVERYTHING), "reference"])
def test_strides_do_not_matter(device, path):
    inputs = build(EVERYTHING, device)
    expected, expected_lse = attend(inputs, path)
    tokens, heads, head_dim = inputs.query.shape
    fused = torch.full((tokens, (heads + 4) * head_dim), math.nan, device=device)
    fused[:, : heads * head_dim] = inputs.query.flatten(1)
    query = fused[:, : heads * head_dim].unflatten(1, (heads, head_dim))
    # Fragments take pages at multiples of 64 bytes.
    buffer = torch.full((len(inputs.pages), 3, 2, inputs.pages.shape[2] + 128), 0xFF, dtype=torch.uint8, device=device)
    pages = buffer[:, 1, :, 64:-64]
    pages.copy_(inputs.pages)
    table = torch.full((len(inputs.seq_lens), 20), 2**30, dtype=torch.int32, device=device)
    table = table[:, 3 : 3 + inputs.block_table.shape[1]].copy_(inputs.block_table)
    written = torch.full((tokens, heads + 2, head_dim), math.nan, device=device)
    strided = replace(inputs, query=query, pages=pages, block_table=table)
    out, lse = attend(strided, path, out=written[:, 1:-1])
    assert out.data_ptr() == written[:, 1:-1].data_ptr()
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert written[:, [0, -1]].isnan().all()


@pytest.mark.parametrize("path", [*kernels(DecodeCase()), "reference"])
@pytest.mark.parametrize("name", ["seq_lens", "seq_starts", "seq_ends", "query_start_loc", "sinks", "key_mean"])
def test_an_argument_with_gaps_is_read_right_or_refused(device, path, name):
    case = DecodeCase(
        seq_lens=(70, 70), seq_starts=(5, 60), seq_ends=(30, 68), query_lens=(1, 1), num_kv_heads=2, sinks=True,
        key_mean=True,
    )  # fmt: skip
    inputs = build(case, device)
    expected, _ = attend(inputs, path)
    arguments = {"seq_lens": inputs.seq_lens, "key_mean": inputs.options["key_transform"].mean, **inputs.options}
    gaps = torch.stack([arguments[name], torch.zeros_like(arguments[name])], dim=1).flatten(0, 1)
    arguments[name] = gaps[::2]
    arguments["key_transform"] = KeyTransform(arguments.pop("key_mean"))
    try:
        out, _ = attend(replace(inputs, seq_lens=arguments.pop("seq_lens")), path, **arguments)
    except ValueError as error:
        assert f"{name} has strides" in str(error)  # noqa: PT017
    else:
        assert torch.equal(out, expected)


def test_auto_is_the_reference_on_a_cpu_and_a_kernel_on_cuda(device):
    inputs = build(DecodeCase(), device)
    out, _ = attend(inputs, "auto")
    path = kernels(DecodeCase())[0] if device.type == "cuda" else "reference"
    assert torch.equal(out, attend(inputs, path)[0])


def test_the_log_sum_exp_is_not_returned_unasked(device):
    inputs = build(DecodeCase(), device)
    for path in (*kernels(DecodeCase()), "reference"):
        arguments = (inputs.query, inputs.pages, inputs.block_table, inputs.seq_lens, inputs.case.layout)
        assert torch.equal(decode_attention(*arguments, path=path), attend(inputs, path)[0])


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("path", [*kernels(EVERYTHING), "auto"])
def test_a_graph_serves_other_lengths(device, path):
    longest = replace(EVERYTHING, seq_lens=(700, 100, 800, 66), seq_ends=(690, 90, 790, 66))
    other = replace(longest, seq_lens=(30, 0, 500, 1000), seq_ends=(20, 0, 600, 1000))
    inputs, shorter = build(longest, device), build(other, device, seed=1)
    width = max(x.block_table.shape[1] for x in (inputs, shorter))
    table = torch.zeros(4, width, dtype=torch.int32, device=device)
    pages = torch.zeros_like(max(inputs.pages, shorter.pages, key=len))
    static = replace(inputs, block_table=table, pages=pages)

    def load(source):
        static.query.copy_(source.query)
        static.seq_lens.copy_(source.seq_lens)
        static.pages[: len(source.pages)] = source.pages
        static.block_table.fill_(2**30)[:, : source.block_table.shape[1]] = source.block_table
        for name in ("sinks", "seq_starts", "seq_ends", "query_start_loc"):
            static.options[name].copy_(source.options[name])
        static.options["key_transform"].mean.copy_(source.options["key_transform"].mean)

    expected = [attend(x, path) for x in (inputs, shorter)]
    arguments = (static.query, static.pages, static.block_table, static.seq_lens, longest.layout)
    kept = [replace(x, query=x.query.clone(), options={**x.options}) for x in (inputs, shorter)]
    kept[0] = replace(kept[0], seq_lens=inputs.seq_lens.clone())
    kept[0].options.update({n: x.clone() for n, x in inputs.options.items() if isinstance(x, torch.Tensor)})
    kept[0].options["key_transform"] = inputs.options["key_transform"].map(torch.clone)
    load(kept[0])
    decode_attention(*arguments, path=path, **static.options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode_attention(*arguments, path=path, return_lse=True, **static.options)
    for source, (want, want_lse) in zip(kept, expected, strict=True):
        load(source)
        graph.replay()
        assert relative_error(out, want) < 1e-3
        torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-4)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(device, data):
    def draw(strategy):
        return data.draw(strategy)

    each = st.tuples(st.integers(0, 90), st.integers(0, 4), st.integers(0, 90), st.integers(-5, 95))
    rows = draw(st.lists(each, min_size=1, max_size=4))
    num_kv_heads = draw(st.integers(1, 2))
    lens, tokens, starts, ends = zip(*rows, strict=True)
    case = DecodeCase(
        head_dim=draw(st.sampled_from([16, 40, 64, 128])),
        key_bits=draw(st.sampled_from(BITS)),
        value_bits=draw(st.sampled_from(BITS)),
        num_heads=num_kv_heads * draw(st.integers(1, 5)),
        num_kv_heads=num_kv_heads,
        block_size=draw(st.sampled_from([8, 16, 24])),
        seq_lens=lens,
        query_lens=draw(st.sampled_from([1, 3, (*tokens[:-1], 2)])),
        paged=draw(st.booleans()),
        seq_starts=draw(st.sampled_from([None, starts])),
        seq_ends=draw(st.sampled_from([None, ends])),
        window=draw(st.sampled_from([None, 7, 64])),
        softcap=draw(st.sampled_from([None, 1.5])),
        sinks=draw(st.booleans()),
        key_mean=draw(st.booleans()),
    )
    inputs = build(case, device)
    expected, expected_lse = inputs.exact()
    out, lse = attend(inputs, "portable")
    assert (out - expected).norm() <= 2e-3 * expected.norm()
    assert_lse(lse, expected_lse, "portable")


def bad(message, **changes):
    return pytest.param(message, changes, id=message)


def moved(x, device):
    """A tensor on a device, as it lies: Tensor.to gives every element of an expanded one a place of its own."""
    memory = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        bad(r"path is 'cuda'; it must be one of auto, .*, reference", path="cuda"),
        bad(r"pages is torch.int8", pages=lambda x: x.view(torch.int8)),
        bad(r"pages is .*; it must be torch.uint8 \[any, 2, 1088\]", pages=lambda x: x[:, :1]),
        bad(r"pages have strides .* even", pages=lambda x: x.new_empty(4, 2, 1089)[..., :1088]),
        bad(r"query is torch.float64; it must be one of", query=lambda x: x.double()),
        bad(r"query is .* \[2, 256\]; it must be", query=lambda x: x.flatten(1)),
        bad(r"query is .* \[2, 4, 32\]; it must be torch.float32 \[any, any, 64\]", query=lambda x: x[..., :32]),
        bad(r"query has strides \[256, 1, 4\]; the last must be 1", query=lambda x: x.mT.contiguous().mT),
        bad(r"query has 0 heads", query=lambda x: x[:, :0]),
        bad(r"query has 3 heads; .* multiple of the 2 KV heads", query=lambda x: x[:, :3]),
        bad(r"seq_lens is torch.int64", seq_lens=lambda x: x.long()),
        bad(r"seq_lens is .* \[2, 1\]", seq_lens=lambda x: x[:, None]),
        bad(r"block_table is torch.int64", block_table=lambda x: x.long()),
        bad(r"block_table is .* \[1, 3\]; it must be torch.int32 \[2, any\]", block_table=lambda x: x[:1]),
        bad(r"block_table has strides \[6, 2\] for", block_table=lambda x: x.repeat_interleave(2, 1)[:, ::2]),
        bad(r"query_start_loc is .* \[2\]; it must be torch.int32 \[3\]", query_start_loc=torch.zeros(2).int()),
        bad(r"seq_starts is torch.int64", seq_starts=torch.zeros(2).long()),
        bad(r"seq_ends is .* \[3\]; it must be torch.int32 \[2\]", seq_ends=torch.zeros(3).int()),
        bad(r"sinks is torch.bfloat16", sinks=torch.zeros(4).bfloat16()),
        bad(r"sinks is .* \[2\]; it must be torch.float32 \[4\]", sinks=torch.zeros(2)),
        bad(
            r"key_mean is .* \[4, 64\]; it must be torch.float32 \[2, 64\]",
            key_transform=KeyTransform(torch.zeros(4, 64)),
        ),
        bad(
            r"key_mean is .* \[3, 2, 64\]; it must be torch.float32 \[2, 2, 64\]",
            key_transform=KeyTransform(torch.zeros(3, 2, 64)),
        ),
        bad(r"key_mean has strides \[1, 2\]", key_transform=KeyTransform(torch.zeros(64, 2).T)),
        bad(r"pages hold 1 rows and seq_lens 2; without", pages=lambda x: x[:1], block_table=lambda x: None),
        bad(r"query has 3 tokens for 2 rows", query=lambda x: torch.cat([x, x[:1]])),
        bad(r"query has 2 tokens for 0 rows", seq_lens=lambda x: x[:0], block_table=lambda x: x[:0]),
        bad(r"max_query_len is 2 and query has 1 tokens a row", max_query_len=2),
        bad(r"query_start_loc needs max_query_len", query_start_loc=torch.zeros(3).int()),
        bad(r"rows have up to 17 query tokens; .* 1 to 16", query=lambda x: x.repeat(17, 1, 1)),
        bad(r"rows have up to 17 query", query_start_loc=torch.zeros(3).int(), max_query_len=17),
        bad(r"rows have up to 0 query", query_start_loc=torch.zeros(3).int(), max_query_len=0),
        bad(r"max_query_len is 1.0; it must be an int", max_query_len=1.0),
        bad(r"max_query_len is True; it must be an int", max_query_len=True),
        *(
            bad(rf"window is {window!r}; it must be an int of at least 1. Use None", window=window)
            for window in (0, 1.5, True, "7", math.nan)
        ),
        *(
            bad(rf"softcap is {softcap!r}; it must be a number from 1e-30 to 10000. Use None", softcap=softcap)
            for softcap in (0.0, -1.0, math.nan, math.inf, 1e5, True, "5")
        ),
        *(
            bad(rf"scale is {scale!r}; it must be a number .* Use None", scale=scale)
            for scale in (math.nan, math.inf, -math.inf, True)
        ),
        bad(r"out is torch.float64", out=torch.zeros(2, 4, 64).double()),
        bad(r"out is torch.float16 .*; it must be torch.float32 \[2, 4, 64\]", out=torch.zeros(2, 4, 64).half()),
        bad(r"out is .* \[3, 4, 64\]; it must be", out=torch.zeros(3, 4, 64)),
        bad(r"out has strides \[256, 1, 4\]", out=torch.zeros(2, 64, 4).mT),
        bad(r"out has strides \[0, 64, 1\] .* more than once", out=torch.zeros(1, 4, 64).expand(2, 4, 64)),
        bad(
            r"out has strides \[256, 32, 1\] .* more than once",
            out=torch.zeros(600).as_strided((2, 4, 64), (256, 32, 1)),
        ),
        bad(r"different devices: .*sinks on meta", sinks=torch.zeros(4, device="meta")),
        bad(r"different devices: .*out on meta", out=torch.zeros(2, 4, 64, device="meta")),
    ],
)
def test_what_does_not_fit_is_refused(device, message, changes):
    layout = KVCacheLayout(TurboQuantConfig(64), 2, 16)
    arguments = {
        "query": torch.zeros(2, 4, 64, device=device),
        "pages": layout.allocate(4, device),
        "block_table": torch.zeros(2, 3, dtype=torch.int32, device=device),
        "seq_lens": torch.ones(2, dtype=torch.int32, device=device),
        "layout": layout,
    }
    for name, change in changes.items():
        given_tensor = isinstance(change, torch.Tensor) and change.device.type == "cpu"
        change = moved(change, device) if given_tensor else change
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)


@pytest.mark.parametrize(("bits", "message"), [((2.5, 4), "key_bits is 2.5"), ((4, 3.5), "value_bits is 3.5")])
def test_fractional_bits_are_refused(device, bits, message):
    layout = KVCacheLayout(TurboQuantConfig(128, *bits), 1, 16)
    lens = torch.ones(1, dtype=torch.int32, device=device)
    query = torch.zeros(1, 1, 128, device=device)
    with pytest.raises(ValueError, match=f"{message}; cache operations store whole bits"):
        decode_attention(query, layout.allocate(1, device), lens[None], lens, layout)


def test_reference_needs_no_triton(run_python):
    code = """
import sys
sys.modules["triton"] = None
import torch
from turboquant_core.ops.decode_attention import decode_attention
from turboquant_core.testing.decode import DecodeCase, build
inputs = build(DecodeCase(), torch.device("cpu"))
out = decode_attention(inputs.query, inputs.pages, inputs.block_table, inputs.seq_lens, inputs.case.layout)
print(bool(out.isfinite().all()), tuple(out.shape))
"""
    assert run_python(code).strip() == "True (1, 4, 128)"


def test_the_output_is_written_beside_the_query_and_not_on_it(device):
    inputs = build(DecodeCase(64, seq_lens=(20, 30), query_lens=2), device)
    num_tokens, num_heads, head_dim = inputs.query.shape
    buffer = torch.zeros(2 * num_tokens + 1, num_heads, 2 * head_dim, device=device)
    query = buffer[:num_tokens, :, :head_dim]
    query.copy_(inputs.query)
    expected, _ = attend(inputs, "reference")

    def attend_into(out):
        arguments = (inputs.pages, inputs.block_table, inputs.seq_lens, inputs.case.layout)
        return decode_attention(query, *arguments, out=out, path="reference", **inputs.options)

    for out in (buffer[:num_tokens, :, head_dim:], buffer[num_tokens:-1, :, :head_dim]):
        assert torch.equal(attend_into(out), expected)
    for out in (
        query,
        buffer[1 : num_tokens + 1, :, :head_dim],
        buffer[:num_tokens, :, 1 : head_dim + 1],
        buffer[:num_tokens, :, head_dim - 1 : -1],
    ):
        with pytest.raises(ValueError, match=r"out, at .*, shares memory with query, at .* Give a tensor of its own"):
            attend_into(out)
    assert torch.equal(query, inputs.query)


@pytest.mark.parametrize("path", ["reference", *kernels(DecodeCase())])
def test_the_output_is_not_written_among_the_pages(device, path):
    inputs = build(DecodeCase(64, seq_lens=(20, 30)), device)
    memory = torch.zeros(inputs.query.nbytes + inputs.pages.nbytes, dtype=torch.uint8, device=device)
    pages = memory[: inputs.pages.nbytes].view(inputs.pages.shape).copy_(inputs.pages)
    expected, _ = attend(inputs, path)

    def attend_into(start):
        out = memory[start : start + inputs.query.nbytes].view(inputs.query.dtype).view(inputs.query.shape)
        arguments = (pages, inputs.block_table, inputs.seq_lens, inputs.case.layout)
        return decode_attention(inputs.query, *arguments, out=out, path=path, **inputs.options)

    assert torch.equal(attend_into(pages.nbytes), expected)
    for start in (0, pages.nbytes - 16):
        with pytest.raises(ValueError, match=r"out, at .*, shares memory with pages, at .* Give a tensor of its own"):
            attend_into(start)
    assert torch.equal(pages, inputs.pages)


@pytest.mark.parametrize("path", ["reference", *kernels(DecodeCase())])
def test_a_query_with_nan_gives_none_to_its_head_alone(device, path):
    inputs = build(DecodeCase(seq_lens=(20, 40)), device)
    expected, _ = attend(inputs, path)
    inputs.query[0, 1, 5] = math.nan
    out, lse = attend(inputs, path)
    assert out[0, 1].isnan().all()
    assert not lse[0, 1].isfinite()
    out[0, 1] = expected[0, 1]
    assert torch.equal(out, expected)


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("path", ["reference", *kernels(DecodeCase())])
def test_a_key_too_long_for_its_scale_is_no_key_of_weight_zero(device, path, softcap):
    inputs = build(DecodeCase(seq_lens=(20,), softcap=softcap), device)
    inputs.case.layout.views(inputs.pages).key_scales[inputs.block_table[0, 0], :, 3] = math.inf
    assert attend(inputs, path)[0].isnan().all()


@pytest.mark.parametrize("path", ["reference", *kernels(DecodeCase())])
def test_minus_infinity_is_no_sink(device, path):
    inputs = build(DecodeCase(seq_lens=(0, 20), sinks=True), device)
    inputs.options["sinks"][:2] = -math.inf
    out, lse = attend(inputs, path)
    assert not out[0, :2].any()
    assert lse[0, :2].isneginf().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("sink", [math.nan, math.inf])
@pytest.mark.parametrize("path", ["reference", *kernels(DecodeCase())])
def test_a_sink_without_a_value_gives_none_to_its_head_alone(device, path, sink):
    inputs = build(DecodeCase(seq_lens=(20, 0), sinks=True), device)
    expected, _ = attend(inputs, path)
    inputs.options["sinks"][1] = sink
    out, lse = attend(inputs, path)
    assert out[:, 1].isnan().all()
    assert not lse[:, 1].isfinite().any()
    out[:, 1] = expected[:, 1]
    assert torch.equal(out, expected)
