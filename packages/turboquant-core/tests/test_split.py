import pytest
import torch

from turboquant_core import MSEQuantizer, QuantizedTensor, TurboQuantConfig
from turboquant_core.packing import unpack
from turboquant_core.split import HalvesRotation, SplitQuantizer, quantizer_of
from turboquant_core.vector_format import MIN_SPLIT_HEAD_DIM, SPLIT_BITS, VectorFormat


def vectors(head_dim, count=64, seed=0):
    x = torch.randn(count, head_dim, generator=torch.Generator().manual_seed(seed))
    x[:, head_dim // 2 :] /= 8
    return x


@pytest.mark.parametrize("head_dim", [48, 64, 80, 128, 256])
@pytest.mark.parametrize("bits", SPLIT_BITS)
def test_halves_are_what_two_quantisers_make_of_them(head_dim, bits):
    x, half = vectors(head_dim), head_dim // 2
    split = SplitQuantizer(head_dim, bits, "unbiased")
    parts = [MSEQuantizer(half, width, "unbiased") for width in (bits + 1, bits - 1)]
    stored = [part.quantize(y) for part, y in zip(parts, x.chunk(2, dim=-1), strict=True)]
    expected = torch.cat([part.dequantize(q) for part, q in zip(parts, stored, strict=True)], dim=-1)
    found = split.quantize(x)
    torch.testing.assert_close(split.dequantize(found), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.scales, torch.cat([q.scales for q in stored], dim=-1))
    joint = unpack(found.codes, 2 * bits, half)
    assert torch.equal(joint & 2 ** (bits + 1) - 1, unpack(stored[0].codes, bits + 1, half))
    assert torch.equal(joint >> bits + 1, unpack(stored[1].codes, bits - 1, half))


@pytest.mark.parametrize("bits", SPLIT_BITS)
def test_two_bytes_more_than_without(bits):
    whole, split = VectorFormat(128, bits), VectorFormat(128, bits, split=True)
    assert (split.code_bytes, split.nbytes) == (whole.code_bytes, whole.nbytes + 2)
    assert sum(group.code_bytes for group in split.groups) == split.code_bytes


def test_a_dear_half_gains_and_the_whole_does():
    x = vectors(128, 512)
    split, whole = (
        (quantizer.dequantize(quantizer.quantize(x)) - x).square().sum().item()
        for quantizer in (SplitQuantizer(128, 3), MSEQuantizer(128, 3))
    )
    assert split < 0.4 * whole


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_vectors_are_none_afterwards(shape):
    quantizer = SplitQuantizer(64, 4)
    stored = quantizer.quantize(torch.empty(shape))
    assert quantizer.dequantize(stored).shape == shape


def test_the_rotation_is_orthogonal_and_keeps_halves_apart():
    rotation = HalvesRotation(96)
    matrix = rotation.matrix
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(96, dtype=torch.float64))
    assert not matrix[:48, 48:].any()
    assert not matrix[48:, :48].any()
    x = vectors(96).double()
    torch.testing.assert_close(rotation.rotate(x), x @ matrix.T)
    torch.testing.assert_close(rotation.unrotate(rotation.rotate(x)), x)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("channel", [3, 100])
def test_a_vector_that_is_not_finite_is_carried_whole(bad, channel):
    x = vectors(128)
    x[5, channel] = bad
    found = SplitQuantizer(128, 4).quantize(x)
    assert found.scales[5].isnan().all()
    assert found.scales.isfinite().all(-1).sum() == len(x) - 1


def test_what_does_not_fit_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"bits is 5; 2, 3, 4 can be split\. Use one of these, or do not split"):
        TurboQuantConfig(128, 5, 4, key_split=True)
    for head_dim in (MIN_SPLIT_HEAD_DIM - 16, 72):
        with pytest.raises(ValueError, match=rf"head_dim is {head_dim}; .* multiples of 16 from 48 on\. Do not split"):
            TurboQuantConfig(head_dim, key_split=True)
    with pytest.raises(ValueError, match="key_split is 1"):
        TurboQuantConfig(128, key_split=1)
    with pytest.raises(ValueError, match=r"got torch.float32 \[3, 64\]; this quantiser takes .* 128"):
        SplitQuantizer(128, 4).quantize(torch.zeros(3, 64))
    with pytest.raises(ValueError, match="split 4-bit vectors of head_dim 128 have 64 and 2"):
        SplitQuantizer(128, 4).dequantize(
            QuantizedTensor(torch.zeros(3, 64, dtype=torch.uint8), torch.ones(3, 1).half())
        )


def test_a_format_names_its_quantiser():
    assert quantizer_of(VectorFormat(128, 4)) == MSEQuantizer(128, 4)
    assert quantizer_of(VectorFormat(128, 4, split=True), "unbiased") == SplitQuantizer(128, 4, "unbiased")
