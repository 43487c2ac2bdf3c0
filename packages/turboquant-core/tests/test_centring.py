import pytest
import torch

from turboquant_core import MSEQuantizer
from turboquant_core.centring import mean_key
from turboquant_core.scale import is_storable
from turboquant_core.testing import gaussian

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_storable_is_what_comes_back_finite(dtype):
    x = gaussian(8, 16, 1).to(dtype)
    x[1, 3], x[2, 0], x[3, 15] = NAN, INF, -INF
    if dtype != torch.float16:
        x[4], x[5] = 1e8, 1e10
    back = MSEQuantizer(16, 4).dequantize(MSEQuantizer(16, 4).quantize(x))
    assert torch.equal(is_storable(x), back.isfinite().all(-1))
    assert is_storable(x).tolist() == [True, False, False, False, True, dtype == torch.float16, True, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_the_mean_of_the_keys_that_count(dtype):
    keys = gaussian(40 * 2, 16, 2).view(40, 2, 16).to(dtype) + 3
    counts = torch.rand(40, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    torch.testing.assert_close(mean_key(keys), keys.float().mean(0))
    expected = torch.stack([keys[counts[:, head], head].float().mean(0) for head in range(2)])
    torch.testing.assert_close(mean_key(keys, counts), expected)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30])
def test_a_key_that_cannot_be_stored_is_in_no_mean(bad):
    keys = gaussian(40 * 2, 16, 3).view(40, 2, 16)
    keys[5, 1, 3] = bad
    others = torch.arange(40) != 5
    torch.testing.assert_close(mean_key(keys), torch.stack([keys[:, 0].mean(0), keys[others, 1].mean(0)]))


def test_a_head_without_such_a_key_has_a_mean_of_zero():
    keys = torch.full((3, 2, 16), NAN)
    keys[:, 0] = 1
    assert mean_key(keys).tolist() == [[1] * 16, [0] * 16]
    assert not mean_key(keys, torch.zeros(3, 1, dtype=torch.bool)).any()
