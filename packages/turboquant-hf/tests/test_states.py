import pytest
import torch

from turboquant_core import MSEQuantizer
from turboquant_hf.states import QuantizedStates


def random_states(*shape, seed=0, offset=0.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) + offset


def relative_error(expected, actual):
    return float((expected - actual).square().sum() / expected.square().sum())


def test_reading_gives_what_the_quantiser_gives():
    states = random_states(2, 3, 10, 64)
    stored = QuantizedStates(4, "least_squares", center=False)
    stored.append(states)
    quantizer = MSEQuantizer(64, 4, "least_squares")
    expected = quantizer.dequantize(quantizer.quantize(states))
    assert torch.equal(stored.dequantize(torch.float32), expected)


def test_tokens_take_their_packed_bytes_and_no_more():
    stored = QuantizedStates(3, "norm", center=False)
    stored.append(random_states(2, 3, 10, 64))
    stored.append(random_states(2, 3, 7, 64, seed=1))
    assert stored.num_tokens == 17
    assert stored.nbytes == stored.token_nbytes == 2 * 3 * 17 * (64 * 3 // 8 + 2)


def test_the_mean_comes_from_the_first_tokens_and_stays():
    first = random_states(1, 2, 30, 64, offset=50.0)
    second = random_states(1, 2, 5, 64, seed=1, offset=-50.0)
    stored = QuantizedStates(4, "norm", center=True)
    stored.append(first)
    mean = stored.tensors()[0].clone()
    before = stored.dequantize(torch.float32)
    stored.append(second)
    assert torch.equal(stored.tensors()[0], mean)
    torch.testing.assert_close(mean, first.mean(-2, keepdim=True))
    assert torch.equal(stored.dequantize(torch.float32)[..., :30, :], before)


def test_centring_saves_states_that_share_a_large_offset():
    states = random_states(1, 2, 30, 64, offset=50.0)
    errors = {}
    for center in (False, True):
        stored = QuantizedStates(4, "norm", center=center)
        stored.append(states)
        errors[center] = relative_error(states, stored.dequantize(torch.float32))
    assert errors[True] < errors[False] / 100


def test_centring_is_by_sequence_and_head():
    states = torch.zeros(2, 2, 8, 64)
    for batch in range(2):
        for head in range(2):
            states[batch, head] = 10.0 * (1 + batch + 2 * head)
    stored = QuantizedStates(2, "norm", center=True)
    stored.append(states)
    assert torch.equal(stored.dequantize(torch.float32), states)


@pytest.mark.parametrize("bits", [2.5, 3.5])
def test_outlier_channels_are_chosen_by_sequence_and_head(bits):
    states = random_states(2, 2, 40, 64)
    for batch in range(2):
        for head in range(2):
            states[batch, head, :, 16 * (batch + 2 * head) :][:, :16] *= 20
    stored = QuantizedStates(bits, "norm", center=False)
    stored.append(states)
    plain = QuantizedStates(int(bits), "norm", center=False)
    plain.append(states)
    error = relative_error(states, stored.dequantize(torch.float32))
    assert error < relative_error(states, plain.dequantize(torch.float32)) / 5
    assert stored.token_nbytes == 2 * 2 * 40 * (int(64 * bits) // 8 + 4)


def test_crop_keeps_the_first_tokens_and_frees_the_rest():
    stored = QuantizedStates(4, "norm", center=True)
    stored.append(random_states(1, 2, 20, 64))
    before = stored.dequantize(torch.float32)
    stored.crop(12)
    assert torch.equal(stored.dequantize(torch.float32), before[..., :12, :])
    assert stored.token_nbytes == 2 * 12 * 34
    stored.crop(0)
    assert stored.num_tokens == 0
    assert stored.nbytes == 0


def test_no_tokens_are_no_calibration():
    stored = QuantizedStates(4, "norm", center=True)
    stored.append(torch.zeros(1, 2, 0, 64))
    assert stored.tensors() == []
    stored.append(random_states(1, 2, 20, 64))
    assert stored.num_tokens == 20


def test_reading_nothing_is_an_error():
    with pytest.raises(RuntimeError, match="no stored states"):
        QuantizedStates(4, "norm", center=True).dequantize(torch.float32)
