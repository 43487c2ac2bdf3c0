import pytest
import torch

from turboquant_core import MSEQuantizer, QuantizedTensor
from turboquant_core.quantized import storage_nbytes
from turboquant_core.testing import gaussian


@pytest.fixture
def quantized():
    return MSEQuantizer(64, 3).quantize(gaussian(24, 64, seed=1).reshape(2, 3, 4, 64))


def assert_same(left, right):
    assert torch.equal(left.codes, right.codes)
    assert torch.equal(left.scales, right.scales)


def test_shape_is_that_of_the_vectors(quantized):
    assert quantized.shape == (2, 3, 4)
    assert quantized.codes.shape == (2, 3, 4, 24)
    assert quantized.scales.shape == (2, 3, 4, 1)


@pytest.mark.parametrize("bits", range(1, 9))
def test_nbytes_are_the_packed_bits_and_two_bytes_a_vector(bits):
    q = MSEQuantizer(128, bits).quantize(gaussian(10, 128, seed=2))
    assert q.nbytes == 10 * (128 * bits // 8 + 2)


def test_a_view_keeps_its_whole_base_allocated(quantized):
    whole = 24 * (24 + 2)
    assert quantized.nbytes == whole
    assert quantized.map(lambda t: t[:1, :, :2]).nbytes == whole
    assert quantized.map(lambda t: t.expand(5, 2, 3, 4, -1)).nbytes == whole
    assert quantized.map(lambda t: t[:1].clone()).nbytes == whole // 2


def test_a_storage_shared_by_codes_and_scales_counts_once():
    buffer = torch.zeros(10, 40, dtype=torch.uint8)
    q = QuantizedTensor(buffer[:, :32], buffer[:, 32:34].view(torch.float16))
    assert q.nbytes == 400
    other = torch.zeros(7, dtype=torch.uint8)
    assert storage_nbytes([buffer, buffer[3:], other, buffer.view(torch.int32)]) == 407


def test_map_applies_to_both_fields_exactly(quantized):
    moved = quantized.map(lambda t: t.transpose(0, 2)[1:])
    assert moved.shape == (3, 3, 2)
    decoded = MSEQuantizer(64, 3).dequantize(quantized)
    assert torch.equal(
        MSEQuantizer(64, 3).dequantize(moved.map(torch.Tensor.contiguous)),
        decoded.transpose(0, 2)[1:],
    )


@pytest.mark.parametrize("dim", [0, 1, 2, -2, -4])
def test_cat_undoes_a_split_along_any_leading_dimension(quantized, dim):
    halves = [quantized.map(lambda t, i=i: t.tensor_split(2, dim)[i]) for i in (0, 1)]
    assert_same(QuantizedTensor.cat(iter(halves), dim), quantized)


def test_cat_is_the_quantisation_of_the_concatenated_vectors():
    quantizer = MSEQuantizer(80, 4)
    x, y = gaussian(6, 80, seed=3), gaussian(9, 80, seed=4)
    joined = QuantizedTensor.cat([quantizer.quantize(x), quantizer.quantize(y)], 0)
    assert_same(joined, quantizer.quantize(torch.cat([x, y])))
