import functools
import math

import numpy as np
import pytest
import torch

from turboquant_core import MSEQuantizer, ProdQuantizer, QuantizedTensor, grid_codebook, unpack
from turboquant_core.codebook import MAX_TABLE_BITS
from turboquant_core.testing import INPUT_KINDS, gaussian

HEAD_DIMS = [64, 80, 96, 128, 256]
ALL_BITS = [1, 2, 3, 4, 5, 6, 8]
HARD_KINDS = ["one_hot", "two_hot", "equal_magnitude", "heavy_tailed"]


def error_ratio(quantizer, x):
    """Mean ‖x - x̂‖² / ‖x‖² over the codebook's own, one value for each leading index."""
    decoded = quantizer.dequantize(quantizer.quantize(x))
    error = (x - decoded).square().sum(-1) / x.square().sum(-1)
    table = grid_codebook(quantizer.head_dim, quantizer.bits).mse
    return error.double().mean(-1) / table


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", ALL_BITS)
def test_gaussian_error_is_the_codebooks(head_dim, bits):
    # Much of the error of fine codes lies in rare outer cells, which takes more draws to see.
    num_values = 8_000_000 if bits == 8 else 3_000_000
    x = gaussian(num_values // head_dim, head_dim, seed=1)
    assert error_ratio(MSEQuantizer(head_dim, bits), x) == pytest.approx(1, abs=0.01)


@functools.cache
def mean_ratios(head_dim, bits):
    """The error of each kind of input over the codebook's, averaged over rotations."""
    num_rotations, num_vectors = (100, 96) if bits == 8 else (50, 48)
    total = torch.zeros(len(HARD_KINDS), dtype=torch.float64)
    for seed in range(num_rotations):
        x = torch.stack([INPUT_KINDS[kind](num_vectors, head_dim, seed) for kind in HARD_KINDS])
        total += error_ratio(MSEQuantizer(head_dim, bits, seed=seed), x)
    return dict(zip(HARD_KINDS, (total / num_rotations).tolist(), strict=True))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("kind", HARD_KINDS)
def test_the_error_of_hard_inputs_is_the_codebooks_averaged_over_rotations(head_dim, bits, kind):
    # Fine grids end early: much of their error lies beyond the last centroid, where few coordinates are.
    assert mean_ratios(head_dim, bits)[kind] == pytest.approx(1, abs=0.08 if bits <= MAX_TABLE_BITS else 0.15)


@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", range(1, MAX_TABLE_BITS + 1))
def test_error_stays_under_the_papers_bound(head_dim, bits):
    bound = math.sqrt(3) * math.pi / 2 * 4.0**-bits
    ratio = error_ratio(MSEQuantizer(head_dim, bits), gaussian(2000, head_dim, seed=2))
    assert ratio * grid_codebook(head_dim, bits).mse <= bound


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_name_the_nearest_centroids_of_the_rotated_unit_vector(head_dim, bits):
    quantizer = MSEQuantizer(head_dim, bits)
    x = gaussian(20, head_dim, seed=3).double()
    unit = x.numpy() / np.linalg.norm(x.numpy(), axis=-1, keepdims=True)
    rotated = np.einsum("ij,nj->ni", quantizer.rotation.matrix.numpy(), unit)
    centroids = grid_codebook(head_dim, bits).centroids_by_code.numpy()
    nearest = np.abs(rotated[..., None] - centroids).argmin(-1)
    codes = unpack(quantizer.quantize(x).codes, bits, head_dim)
    np.testing.assert_array_equal(codes.numpy(), nearest)


@pytest.mark.parametrize("head_dim", [64, 80])
def test_dequantize_undoes_the_rotation_of_scaled_centroids(head_dim):
    quantizer = MSEQuantizer(head_dim, 3)
    x = gaussian(20, head_dim, seed=4)
    q = quantizer.quantize(x)
    centroids = grid_codebook(head_dim, 3).centroids_by_code.numpy()
    codes = unpack(q.codes, 3, head_dim).numpy()
    rotated = centroids[codes] * q.scales.numpy().astype(np.float64) ** 2
    np.testing.assert_allclose(quantizer.dequantize_rotated(q).numpy(), rotated, rtol=1e-6)
    decoded = rotated @ quantizer.rotation.matrix.numpy()
    np.testing.assert_allclose(quantizer.dequantize(q).numpy(), decoded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (3, 64), (2, 3, 5, 64)])
def test_leading_dimensions_are_kept(shape):
    quantizer = MSEQuantizer(64, 4)
    x = gaussian(30, 64, seed=5).flatten()[: math.prod(shape)].reshape(shape)
    q = quantizer.quantize(x)
    assert q.shape == shape[:-1]
    decoded = quantizer.dequantize(q)
    assert decoded.shape == shape
    torch.testing.assert_close(decoded, x, rtol=0, atol=1)


def test_every_vector_is_quantised_by_itself():
    quantizer = MSEQuantizer(96, 4)
    x = gaussian(40, 96, seed=6)
    whole = quantizer.dequantize(quantizer.quantize(x))
    alone = torch.stack([quantizer.dequantize(quantizer.quantize(row)) for row in x])
    torch.testing.assert_close(whole, alone, rtol=0, atol=1e-5)


def test_memory_order_does_not_matter():
    quantizer = MSEQuantizer(64, 4)
    x = gaussian(64, 12, seed=7)
    strided, contiguous = quantizer.quantize(x.T), quantizer.quantize(x.T.contiguous())
    assert torch.equal(strided.codes, contiguous.codes)
    assert torch.equal(strided.scales, contiguous.scales)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dequantize_gives_the_type_asked_for(dtype):
    quantizer = MSEQuantizer(64, 4)
    q = quantizer.quantize(gaussian(3, 64, seed=8))
    decoded = quantizer.dequantize(q, dtype)
    assert decoded.dtype == dtype
    assert torch.equal(decoded, quantizer.dequantize(q).to(dtype))


def test_seeds_give_different_codes_and_decode_their_own():
    x = gaussian(50, 64, seed=9)
    first, second = MSEQuantizer(64, 6), MSEQuantizer(64, 6, seed=1)
    assert not torch.equal(first.quantize(x).codes, second.quantize(x).codes)
    assert (second.dequantize(second.quantize(x)) - x).square().mean() < 0.01
    assert (first.dequantize(second.quantize(x)) - x).square().mean() > 1


def test_equal_arguments_make_equal_quantisers():
    assert MSEQuantizer(64, 4) == MSEQuantizer(64, 4, "norm", None)
    assert len({MSEQuantizer(64, 4), MSEQuantizer(64, 4), MSEQuantizer(64, 3)}) == 2


@pytest.mark.parametrize(
    "x",
    [torch.zeros(3, 63), torch.zeros(3, 64, dtype=torch.int32), torch.tensor(1.0)],
    ids=["size", "type", "scalar"],
)
def test_other_inputs_are_refused(x):
    with pytest.raises(ValueError, match=r"this quantiser takes floating-point \[..., 64\]"):
        MSEQuantizer(64, 4).quantize(x)


def test_codes_of_another_width_are_refused():
    q = MSEQuantizer(64, 4).quantize(torch.ones(2, 64))
    with pytest.raises(ValueError, match="64 codes of 3 bits"):
        MSEQuantizer(64, 3).dequantize(q)


@pytest.mark.parametrize("head_dim", [0, 60, 520])
def test_a_head_dim_out_of_range_is_named_with_the_limits(head_dim):
    with pytest.raises(ValueError, match=rf"head_dim is {head_dim}; .* from 8 to 512"):
        MSEQuantizer(head_dim, 4)


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_bits_out_of_range_are_named_with_the_limits(bits):
    with pytest.raises(ValueError, match=rf"bits is {bits}; .* 1 to 8"):
        MSEQuantizer(64, bits)


@pytest.mark.parametrize("bits", [4.0, 2.5])
def test_bits_that_are_no_integer_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits is {bits}; codes have 1 to 8 whole bits"):
        MSEQuantizer(64, bits)


@pytest.mark.parametrize("shape", [(2, 2), (2, 64), (1,)])
def test_scales_of_another_shape_are_refused(shape):
    quantizer = MSEQuantizer(64, 4)
    codes = quantizer.quantize(torch.ones(2, 64)).codes
    with pytest.raises(ValueError, match="scales are "):
        quantizer.dequantize(QuantizedTensor(codes, torch.ones(shape, dtype=torch.float16)))


@pytest.mark.parametrize("quantizer", [MSEQuantizer(72, 3, seed=5), ProdQuantizer(72, 4, seed=5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gradient_passes_what_inference_mode_has_made(quantizer, dtype):
    x = gaussian(4, 72, seed=1).to(dtype)
    with torch.inference_mode():
        expected = quantizer.quantize(x).codes
    # What it saves for a backward pass may be of no inference mode.
    found = quantizer.quantize(x.clone().requires_grad_()).codes
    assert torch.equal(found, expected)
