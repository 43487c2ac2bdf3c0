import pytest
import torch

from turboquant_core import MSEQuantizer, grid_codebook
from turboquant_core.scale import MAX_SCALE, SCALE_BYTES, SCALE_RULES, decode_scale, encode_scale, is_storable
from turboquant_core.testing import gaussian

# float16 keeps eleven bits of the root, so the square is right to two parts in 2**11.
STORED_PRECISION = 2.0**-10 * 1.001

every_rule = pytest.mark.parametrize("rule", SCALE_RULES)


def reconstruct(x, bits, rule):
    quantizer = MSEQuantizer(x.shape[-1], bits, rule)
    return quantizer.dequantize(quantizer.quantize(x), torch.float64)


def slope(x, reconstructed):
    """Of ⟨q, x̂⟩ over ⟨q, x⟩ for queries of every direction: the mean projection of x̂ on x."""
    x = x.double()
    return ((reconstructed * x).sum(-1) / x.square().sum(-1)).mean().item()


def relative_error(x, reconstructed):
    x = x.double()
    return ((reconstructed - x).square().sum(-1) / x.square().sum(-1)).mean().item()


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("bits", range(1, 9))
def test_unbiased_inner_products_have_slope_one(head_dim, bits):
    x = gaussian(4000, head_dim, seed=1)
    reconstructed = reconstruct(x, bits, "unbiased")
    assert slope(x, reconstructed) == pytest.approx(1, abs=1e-4)
    each = (reconstructed * x).sum(-1) / x.square().sum(-1)
    assert (each - 1).abs().max() < STORED_PRECISION + 1e-5


@pytest.mark.parametrize(("bits", "shrinkage"), [(4, 0.009), (2, 0.115)])
def test_the_plain_norm_shrinks_inner_products(bits, shrinkage):
    x = gaussian(8000, 64, seed=2)
    assert slope(x, reconstruct(x, bits, "norm")) == pytest.approx(1 - shrinkage, abs=1.5e-3)


@pytest.mark.parametrize("bits", range(1, 7))
def test_the_plain_norm_shrinks_inner_products_by_the_mean_square_error(bits):
    x = gaussian(40_000, 128, seed=3)
    shrinkage = 1 - slope(x, reconstruct(x, bits, "norm"))
    assert shrinkage == pytest.approx(grid_codebook(128, bits).mse, rel=0.05, abs=5e-5)


@pytest.mark.parametrize("bits", range(1, 6))
def test_least_squares_has_the_smallest_error(bits):
    x = gaussian(8000, 64, seed=4)
    error = {rule: relative_error(x, reconstruct(x, bits, rule)) for rule in SCALE_RULES}
    assert error["least_squares"] < 0.999 * error["norm"]
    assert error["least_squares"] < 0.999 * error["unbiased"]


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.0135), (3, 0.0267), (4, 0.0350)])
def test_least_squares_gains_what_was_measured_apart_from_this_package(bits, gain):
    x = gaussian(20000, 64, seed=5)
    norm, fitted = (relative_error(x, reconstruct(x, bits, rule)) for rule in ("norm", "least_squares"))
    assert 1 - fitted / norm == pytest.approx(gain, abs=0.002)


@every_rule
def test_no_scale_along_the_decoded_direction_beats_least_squares(rule):
    x = gaussian(500, 64, seed=6).double()
    decoded = reconstruct(x, 3, rule)
    best = (decoded * x).sum(-1, keepdim=True) / decoded.square().sum(-1, keepdim=True) * decoded
    fitted = reconstruct(x, 3, "least_squares")
    torch.testing.assert_close(fitted, best, rtol=STORED_PRECISION, atol=1e-6)


@every_rule
def test_vectors_of_any_shape_have_scales_of_their_own(rule):
    x, quantizer = gaussian(2 * 64 * 64, 64, seed=8), MSEQuantizer(64, 2, rule)
    scales = quantizer.quantize(x.view(2, 64, 64, 64)).scales
    torch.testing.assert_close(scales.view(-1), quantizer.quantize(x).scales.view(-1))


def test_which_vectors_come_back_finite():
    x = torch.zeros(2, 5, 64, dtype=torch.float64)
    longest = torch.tensor(MAX_SCALE, dtype=torch.float64)
    x[0, :, 0] = torch.stack([longest, longest.nextafter(2 * longest), *torch.tensor([torch.nan, torch.inf, 0.0])])
    assert is_storable(x).tolist() == [[True, False, False, False, True], [True] * 5]
    # Their lengths overflow float16.
    x = torch.full((2, 64), 6e4, dtype=torch.float16)
    x[1, 3] = torch.inf
    assert is_storable(x).tolist() == [True, False]


@every_rule
def test_a_scale_is_two_bytes(rule):
    q = MSEQuantizer(128, 4, rule).quantize(gaussian(3, 128, seed=7))
    assert q.scales.dtype == torch.float16
    assert q.scales.shape == (3, 1)
    assert q.scales.nbytes == 3 * SCALE_BYTES == 6


@pytest.mark.parametrize("exponent", range(-8, 10))
def test_stored_scales_keep_eleven_bits_of_their_root(exponent):
    generator = torch.Generator().manual_seed(8)
    scales = (1 + 2 * torch.rand(1000, 1, generator=generator, dtype=torch.float64)) * 10**exponent
    stored = encode_scale(scales)
    assert stored.dtype == torch.float16
    torch.testing.assert_close(decode_scale(stored, torch.float64), scales, rtol=STORED_PRECISION, atol=0)


def test_the_range_of_stored_scales_has_ends():
    scales = torch.tensor([0.0, 1e-16, 1e-14, 4.28e9, 4.3e9, 1e10, float("inf"), float("nan")])
    decoded = decode_scale(encode_scale(scales))
    assert decoded[:2].tolist() == [0, 0]
    assert 0 < decoded[2] < 1e-13
    assert decoded[3] == pytest.approx(4.28e9, rel=STORED_PRECISION)
    assert not decoded[4:].isfinite().any()


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("norm", [1e-6, 1e6])
def test_short_and_long_vectors_come_back_as_unit_vectors_do(rule, dtype, norm):
    unit = torch.nn.functional.normalize(gaussian(2000, 128, seed=9).double(), dim=-1)
    reference = relative_error(unit, reconstruct(unit, 4, rule))
    x = (norm * unit).to(dtype)
    assert relative_error(x, reconstruct(x, 4, rule)) == pytest.approx(reference, rel=0.01)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_input_type_is_quantised_as_the_values_it_holds(rule, dtype):
    x = gaussian(200, 64, seed=10).to(dtype)
    quantizer = MSEQuantizer(64, 4, rule)
    q, reference = quantizer.quantize(x), quantizer.quantize(x.double())
    same = (q.codes == reference.codes).float().mean()
    assert same > 0.999
    torch.testing.assert_close(q.scales, reference.scales, rtol=2e-3, atol=0)


@every_rule
@pytest.mark.parametrize("bits", [1, 3, 4, 8])
def test_a_zero_vector_comes_back_as_zero(rule, bits):
    x = gaussian(3, 64, seed=11)
    x[1] = 0
    quantizer = MSEQuantizer(64, bits, rule)
    decoded = quantizer.dequantize(quantizer.quantize(x))
    assert (decoded[1] == 0).all()
    assert (decoded[0] != 0).all()


@every_rule
@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_vector_with_nan_or_inf_has_no_finite_coordinate_and_its_neighbours_do_not_notice(rule, bits, bad):
    x = gaussian(5, 64, seed=12)
    quantizer = MSEQuantizer(64, bits, rule)
    clean = quantizer.dequantize(quantizer.quantize(x))
    x[2, 17] = bad
    decoded = quantizer.dequantize(quantizer.quantize(x))
    assert not decoded[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(decoded[others], clean[others])


@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", [1e10, 1e30])
def test_a_vector_too_long_to_store_has_no_finite_coordinate(rule, dtype, norm):
    x = torch.nn.functional.normalize(gaussian(4, 64, seed=13).to(dtype), dim=-1)
    assert not reconstruct(norm * x, 4, rule).isfinite().any()


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="'cosine'; it must be one of norm, unbiased, least_sq"):
        MSEQuantizer(64, 4, "cosine")
