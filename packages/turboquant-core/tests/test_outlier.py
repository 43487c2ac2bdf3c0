import pytest
import torch

from turboquant_core import MSEQuantizer, OutlierQuantizer
from turboquant_core.testing import gaussian

HEAD_DIMS = [32, 64, 96, 128, 256]


def with_outlier_channels(num_vectors, head_dim, seed):
    """Vectors with a quarter of their channels, shuffled, fifteen times the size of the others."""
    generator = torch.Generator().manual_seed(seed)
    outliers = torch.randperm(head_dim, generator=generator)[: head_dim // 4]
    x = gaussian(num_vectors, head_dim, seed)
    x[:, outliers] *= 15
    return x, outliers


def relative_error(quantizer, x):
    decoded = quantizer.dequantize(quantizer.quantize(x))
    return ((x - decoded).square().sum() / x.square().sum()).item()


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_storage_is_exactly_the_bits_and_two_scales(head_dim, bits):
    x, _ = with_outlier_channels(10, head_dim, seed=1)
    q = OutlierQuantizer.calibrate(x, bits).quantize(x)
    assert 8 * q.codes.shape[-1] / head_dim == bits
    assert q.codes.untyped_storage().nbytes() == 10 * head_dim * bits / 8
    assert q.nbytes == 10 * (head_dim * bits / 8 + 4)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_calibration_finds_the_outlier_channels(head_dim):
    x, outliers = with_outlier_channels(64, head_dim, seed=2)
    order = OutlierQuantizer.calibrate(x, 2.5).channel_order[0]
    assert set(order[: head_dim // 4].tolist()) == set(outliers.tolist())
    assert sorted(order.tolist()) == list(range(head_dim))


def test_channels_of_equal_energy_keep_their_order():
    order = OutlierQuantizer.calibrate(torch.ones(3, 64), 2.5).channel_order
    assert order.tolist() == [list(range(64))]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("bits", "plain_bits"), [(2.5, 2), (3.5, 3)])
def test_half_a_bit_more_saves_most_of_the_error_of_vectors_with_outliers(head_dim, bits, plain_bits):
    x, _ = with_outlier_channels(500, head_dim, seed=3)
    plain = relative_error(MSEQuantizer(head_dim, plain_bits), x)
    assert relative_error(OutlierQuantizer.calibrate(x, bits), x) < 0.15 * plain
    # A bit more for every channel saves less.
    assert relative_error(OutlierQuantizer.calibrate(x, bits), x) < 0.5 * relative_error(
        MSEQuantizer(head_dim, plain_bits + 1), x
    )


@pytest.mark.parametrize(("bits", "high", "low"), [(2.5, 4, 2), (3.5, 5, 3)])
def test_the_two_groups_are_quantised_by_themselves(bits, high, low):
    x, _ = with_outlier_channels(20, 128, seed=4)
    quantizer = OutlierQuantizer.calibrate(x, bits)
    order = quantizer.channel_order[0]
    parts = [(MSEQuantizer(32, high), x[:, order[:32]]), (MSEQuantizer(96, low), x[:, order[32:]])]
    q, decoded = quantizer.quantize(x), torch.empty_like(x)
    stored = [group.quantize(part) for group, part in parts]
    assert torch.equal(q.codes, torch.cat([part.codes for part in stored], -1))
    assert torch.equal(q.scales, torch.cat([part.scales for part in stored], -1))
    decoded[:, order[:32]] = parts[0][0].dequantize(stored[0])
    decoded[:, order[32:]] = parts[1][0].dequantize(stored[1])
    assert torch.equal(quantizer.dequantize(q), decoded)


def test_every_head_has_its_own_outliers():
    heads = [with_outlier_channels(40, 64, seed) for seed in (5, 6, 7)]
    x = torch.stack([head for head, _ in heads]).expand(2, 3, 40, 64)
    quantizer = OutlierQuantizer.calibrate(x[0], 2.5)
    assert quantizer.channel_order.shape == (3, 1, 64)
    for order, (_, outliers) in zip(quantizer.channel_order[:, 0], heads, strict=True):
        assert set(order[:16].tolist()) == set(outliers.tolist())
    decoded = quantizer.dequantize(quantizer.quantize(x))
    for i, (head, _) in enumerate(heads):
        alone = OutlierQuantizer.calibrate(head, 2.5)
        expected = alone.dequantize(alone.quantize(head))
        torch.testing.assert_close(decoded[1, i], expected, rtol=0, atol=1e-4)


def test_calibration_sums_over_the_dimension_asked_for():
    x, outliers = with_outlier_channels(40, 64, seed=8)
    quantizer = OutlierQuantizer.calibrate(x.reshape(40, 1, 64), 3.5, dim=0)
    assert quantizer.channel_order.shape == (1, 1, 64)
    assert set(quantizer.channel_order[0, 0, :16].tolist()) == set(outliers.tolist())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_input_and_output_types(dtype):
    x, _ = with_outlier_channels(40, 64, seed=9)
    quantizer = OutlierQuantizer.calibrate(x.to(dtype), 3.5)
    decoded = quantizer.dequantize(quantizer.quantize(x.to(dtype)), dtype)
    assert decoded.dtype == dtype
    assert (decoded.double() - x).square().sum() < 0.03 * x.square().sum()


@pytest.mark.parametrize("rule", ["unbiased", "least_squares"])
def test_the_scale_rule_applies_to_both_groups(rule):
    x, _ = with_outlier_channels(20, 128, seed=10)
    quantizer = OutlierQuantizer.calibrate(x, 2.5, scale=rule)
    order, q = quantizer.channel_order[0], quantizer.quantize(x)
    high = MSEQuantizer(32, 4, rule).quantize(x[:, order[:32]])
    low = MSEQuantizer(96, 2, rule).quantize(x[:, order[32:]])
    assert torch.equal(q.scales, torch.cat([high.scales, low.scales], -1))


@pytest.mark.parametrize("channel", [0, 63])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_vector_with_nan_or_inf_has_no_finite_coordinate(channel, bad):
    x = gaussian(3, 64, seed=11)
    quantizer = OutlierQuantizer(2.5, torch.arange(64))
    clean = quantizer.dequantize(quantizer.quantize(x))
    x[1, channel] = bad
    decoded = quantizer.dequantize(quantizer.quantize(x))
    assert not decoded[1].isfinite().any()
    assert torch.equal(decoded[[0, 2]], clean[[0, 2]])


def test_a_zero_vector_comes_back_as_zero():
    quantizer = OutlierQuantizer(3.5, torch.arange(64))
    assert (quantizer.dequantize(quantizer.quantize(torch.zeros(2, 64))) == 0).all()


@pytest.mark.parametrize("bits", [2, 3, 4.5])
def test_other_bits_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits is {bits}; outlier channels serve 2.5, 3.5"):
        OutlierQuantizer(bits, torch.arange(64))


def test_a_head_dim_that_has_no_quarter_of_whole_bytes_is_refused():
    with pytest.raises(ValueError, match=r"head_dim is 80; 2.5 bits .* multiple of 32"):
        OutlierQuantizer(2.5, torch.arange(80))


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="scale rule is 'mean'"):
        OutlierQuantizer(2.5, torch.arange(64), "mean")


@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 63), torch.zeros(3, 64, dtype=torch.int32), torch.tensor(1.0)],
    ids=["size", "type", "scalar"],
)
def test_other_inputs_are_refused(x):
    with pytest.raises(ValueError, match="this quantiser takes floating-point"):
        OutlierQuantizer(2.5, torch.arange(64)).quantize(x)


def test_stored_vectors_of_another_format_are_refused():
    quantizer = OutlierQuantizer(2.5, torch.arange(64))
    finer = OutlierQuantizer(3.5, torch.arange(64)).quantize(torch.ones(2, 64))
    one_scale = quantizer.quantize(torch.ones(2, 64)).map(lambda t: t)
    one_scale = type(one_scale)(one_scale.codes, one_scale.scales[:, :1])
    for q in (finer, one_scale):
        with pytest.raises(ValueError, match=r"2.5-bit vectors of head_dim 64 have 20 and 2"):
            quantizer.dequantize(q)


@pytest.mark.parametrize("order", [torch.zeros(64, dtype=torch.int64), torch.arange(1, 65)], ids=["repeats", "range"])
def test_an_order_that_is_no_permutation_is_refused(order):
    with pytest.raises(ValueError, match="channel_order must name each of the 64 channels once"):
        OutlierQuantizer(2.5, order)


def test_calibration_on_a_single_vector_is_refused():
    with pytest.raises(ValueError, match=r"got \[64\]; calibration takes sample vectors"):
        OutlierQuantizer.calibrate(torch.ones(64), 2.5)


def test_map_reorders_the_groups_of_the_channel_order():
    x = gaussian(2 * 30, 64, seed=12).reshape(2, 30, 64)
    quantizer = OutlierQuantizer.calibrate(x, 2.5, scale="unbiased")
    swapped = quantizer.map(lambda order: order[[1, 0]])
    expected = quantizer.dequantize(quantizer.quantize(x))
    assert torch.equal(swapped.dequantize(swapped.quantize(x[[1, 0]])), expected[[1, 0]])
    assert (swapped.bits, swapped.scale) == (2.5, "unbiased")
