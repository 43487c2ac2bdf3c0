import math

import pytest
import torch

from turboquant_core import MSEQuantizer, ProdQuantizer
from turboquant_core.testing import gaussian

NUM_SEEDS = 200


def unit_vectors(num_vectors, head_dim, seed):
    return torch.nn.functional.normalize(gaussian(num_vectors, head_dim, seed), dim=-1)


def estimates_over_seeds(make_quantizer, queries, x):
    """Estimates of ⟨query, x⟩, one row for each seed, float64."""
    rows = []
    for seed in range(NUM_SEEDS):
        quantizer = make_quantizer(seed)
        decoded = quantizer.dequantize(quantizer.quantize(x), torch.float64)
        rows.append((queries.double() * decoded).sum(-1))
    return torch.stack(rows)


def z_scores(estimates, truth):
    return (estimates.mean(0) - truth) / (estimates.std(0) / len(estimates) ** 0.5)


@pytest.fixture(scope="module", params=[64, 80])
def pairs(request):
    x = unit_vectors(24, request.param, seed=1)
    # Queries near x have inner products that a shrinking estimator gets wrong.
    queries = torch.nn.functional.normalize(x + unit_vectors(24, request.param, seed=2), dim=-1)
    return queries, x, (queries.double() * x.double()).sum(-1)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_inner_products_are_right_on_average_over_rotations_and_sketches(pairs, bits):
    queries, x, truth = pairs
    head_dim = x.shape[-1]
    estimates = estimates_over_seeds(lambda s: ProdQuantizer(head_dim, bits, s), queries, x)
    z = z_scores(estimates, truth)
    assert z.abs().max() < 4.5
    pooled = (estimates - truth).mean(1)
    assert abs(pooled.mean() / (pooled.std() / NUM_SEEDS**0.5)) < 4


def test_the_same_statistic_sees_the_bias_of_the_mse_quantiser(pairs):
    queries, x, truth = pairs
    head_dim = x.shape[-1]
    estimates = estimates_over_seeds(lambda s: MSEQuantizer(head_dim, 2, seed=s), queries, x)
    assert z_scores(estimates, truth).mean() < -10


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("bits", "paper"), [(1, 1.57), (2, 0.56), (3, 0.18), (4, 0.053)])
def test_the_error_of_inner_products_meets_the_paper(head_dim, bits, paper):
    errors = []
    for seed in range(8):
        x = unit_vectors(1000, head_dim, seed=10 + seed)
        queries = unit_vectors(1000, head_dim, seed=100 + seed)
        quantizer = ProdQuantizer(head_dim, bits, seed)
        estimate = quantizer.inner_product(queries, quantizer.quantize(x))
        errors.append((estimate - (queries * x).sum(-1)).square().mean().item())
    error = sum(errors) / len(errors)
    assert error <= math.sqrt(3) * math.pi**2 / head_dim * 4.0**-bits
    assert error * head_dim == pytest.approx(paper, rel=0.1)


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_inner_product_is_that_with_the_decoded_vector(head_dim, bits):
    quantizer = ProdQuantizer(head_dim, bits)
    x, queries = gaussian(30, head_dim, seed=3), gaussian(30, head_dim, seed=4)
    q = quantizer.quantize(x)
    expected = (queries.double() * quantizer.dequantize(q, torch.float64)).sum(-1)
    estimate = quantizer.inner_product(queries, q)
    assert estimate.dtype == torch.float32
    torch.testing.assert_close(estimate.double(), expected, rtol=0, atol=1e-4)


def test_queries_broadcast_against_the_stored_vectors():
    quantizer = ProdQuantizer(64, 3)
    q = quantizer.quantize(gaussian(10, 64, seed=5).reshape(2, 5, 64))
    queries = gaussian(4, 64, seed=6).reshape(4, 1, 1, 64).to(torch.bfloat16)
    estimate = quantizer.inner_product(queries, q)
    expected = torch.einsum("qd,btd->qbt", queries[:, 0, 0].float(), quantizer.dequantize(q))
    torch.testing.assert_close(estimate, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_storage_is_the_bits_and_two_scales(bits):
    q = ProdQuantizer(96, bits).quantize(gaussian(7, 96, seed=7).reshape(7, 1, 96))
    assert q.shape == (7, 1)
    assert q.nbytes == 7 * (96 * bits // 8 + 2 * 2)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_coarse_part_is_the_mse_quantisers(bits):
    x = gaussian(20, 64, seed=8)
    q, base = ProdQuantizer(64, bits).quantize(x), MSEQuantizer(64, bits - 1).quantize(x)
    assert torch.equal(q.codes[:, :-8], base.codes)
    torch.testing.assert_close(q.scales[:, :1], base.scales, rtol=2e-3, atol=0)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_second_scale_is_the_length_of_what_was_left_over(bits):
    x = gaussian(20, 64, seed=9)
    base = MSEQuantizer(64, bits - 1)
    left_over = (x - base.dequantize(base.quantize(x))).norm(dim=-1)
    stored = ProdQuantizer(64, bits).quantize(x).scales[:, 1].float().square()
    torch.testing.assert_close(stored, left_over, rtol=3e-3, atol=0)


@pytest.mark.parametrize("norm", [1e-6, 1e6])
def test_short_and_long_vectors_come_back_as_unit_vectors_do(norm):
    quantizer = ProdQuantizer(64, 4)
    x = unit_vectors(200, 64, seed=10)
    reference = quantizer.dequantize(quantizer.quantize(x))
    decoded = quantizer.dequantize(quantizer.quantize(norm * x)) / norm
    torch.testing.assert_close(decoded, reference, rtol=0, atol=2e-3)


@pytest.mark.parametrize("bits", [1, 3])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e11])
def test_what_cannot_be_stored_has_no_finite_coordinate_and_zero_is_zero(bits, bad):
    quantizer = ProdQuantizer(64, bits)
    x = gaussian(3, 64, seed=11)
    clean = quantizer.dequantize(quantizer.quantize(x))
    x[0, 5] = bad
    x[1] = 0
    decoded = quantizer.dequantize(quantizer.quantize(x))
    assert not decoded[0].isfinite().any()
    assert (decoded[1] == 0).all()
    assert torch.equal(decoded[2], clean[2])


@pytest.mark.parametrize(
    ("given", "asked"),
    [(torch.bfloat16, torch.float16), (torch.float64, torch.float32), (torch.float16, None)],
)
def test_input_and_output_types(given, asked):
    quantizer = ProdQuantizer(64, 4)
    x = gaussian(5, 64, seed=12).to(given)
    q = quantizer.quantize(x)
    decoded = quantizer.dequantize(q) if asked is None else quantizer.dequantize(q, asked)
    assert decoded.dtype == (asked or torch.float32)
    assert (decoded.double() - x.double()).square().mean() < 0.1


@pytest.mark.parametrize("x", [torch.zeros(3, 63), torch.zeros(3, 64, dtype=torch.int32)], ids=["size", "type"])
def test_other_inputs_are_refused(x):
    with pytest.raises(ValueError, match=r"this quantiser takes floating-point \[..., 64\]"):
        ProdQuantizer(64, 4).quantize(x)


@pytest.mark.parametrize("bits", [1, 3])
def test_stored_vectors_of_another_format_are_refused(bits):
    quantizer = ProdQuantizer(64, bits)
    expected = rf"{bits}-bit Prod vectors of head_dim 64 have {8 * bits} and 2"
    wider = ProdQuantizer(64, bits + 1).quantize(torch.ones(2, 64))
    one_scale = MSEQuantizer(64, bits).quantize(torch.ones(2, 64))
    for q in (wider, one_scale):
        with pytest.raises(ValueError, match=expected):
            quantizer.dequantize(q)
        with pytest.raises(ValueError, match=expected):
            quantizer.inner_product(torch.ones(2, 64), q)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range_are_named_with_the_limits(bits):
    with pytest.raises(ValueError, match=rf"bits is {bits}; .* 1 to 8"):
        ProdQuantizer(64, bits)


def test_a_head_dim_out_of_range_is_named_with_the_limits():
    with pytest.raises(ValueError, match=r"head_dim is 100; .* from 8 to 512"):
        ProdQuantizer(100, 4)
