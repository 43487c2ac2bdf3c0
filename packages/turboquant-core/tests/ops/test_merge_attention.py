import pytest
import torch

from turboquant_core.ops.merge_attention.reference import merge_attention as reference

pytest.importorskip("triton")

from turboquant_core.ops.merge_attention.launch import BLOCK_TOKENS, launch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, HEADS, KV_HEADS = 2, 6, 3


def arguments(query_len, head_dim, num_dense, dtype, same_bias=False):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    bias = torch.where(draw(1 if same_bias else ROWS, query_len, num_dense) < 0.5, 0.0, -torch.inf)
    bias[..., 0] = 0.0
    bias[..., -1] = -torch.inf
    # What a model passes is a transposed view.
    query = draw(ROWS, query_len, HEADS, head_dim).to(DEVICE, dtype).transpose(1, 2)
    keys, values = (draw(ROWS, KV_HEADS, num_dense, head_dim).to(DEVICE, dtype) for _ in range(2))
    lse = draw(ROWS, query_len, HEADS) * 3
    lse[0, 0, 0] = -torch.inf
    codes = draw(ROWS, query_len, HEADS, head_dim).to(DEVICE, dtype), lse.to(DEVICE)
    return query, (keys, values, bias.to(DEVICE)), codes, draw(HEADS).to(DEVICE)


@pytest.mark.parametrize("num_dense", [2, BLOCK_TOKENS + 9])
@pytest.mark.parametrize(("query_len", "head_dim"), [(1, 64), (5, 80)])
@pytest.mark.parametrize("with_codes", [True, False])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"sinks": ...}, {"softcap": 1.5, "sinks": ...}])
def test_the_kernel_gives_what_plain_pytorch_gives(num_dense, query_len, head_dim, with_codes, options):
    query, dense, codes, sinks = arguments(query_len, head_dim, num_dense, torch.float32, same_bias=with_codes)
    options = {"scale": 0.3, "softcap": None, "sinks": None, **options}
    if options["sinks"] is not None:
        options["sinks"] = sinks
    codes = codes if with_codes else None
    expected = reference(query, *dense, codes, **options)
    torch.testing.assert_close(launch(query, *dense, codes, **options), expected, rtol=1e-5, atol=1e-5)


def test_large_softcaps_and_logits_do_not_overflow():
    query, dense, codes, sinks = arguments(1, 64, 40, torch.float32)
    options = {"scale": 300.0, "softcap": 30.0, "sinks": sinks}
    expected = reference(query, *dense, codes, **options)
    torch.testing.assert_close(launch(query, *dense, codes, **options), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types(dtype):
    query, dense, codes, _ = arguments(3, 128, 50, dtype)
    options = {"scale": None, "softcap": None, "sinks": None}
    actual, expected = (f(query, *dense, codes, **options) for f in (launch, reference))
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected)
