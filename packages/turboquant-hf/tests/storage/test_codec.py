import pytest
import torch

from turboquant_core import MSEQuantizer, OutlierQuantizer, TurboQuantConfig
from turboquant_core.testing import gaussian
from turboquant_hf.storage.codec import LayerCodec

NUM_TOKENS, HEADS, HEAD_DIM = 41, 2, 64


@pytest.mark.parametrize("bits", [4, 2.5])
@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_a_vector_that_cannot_be_stored_harms_no_other(bits, counted, bad):
    keys, values = (gaussian(NUM_TOKENS * HEADS, HEAD_DIM, s).view(NUM_TOKENS, HEADS, HEAD_DIM) for s in (1, 2))
    counts = torch.ones(NUM_TOKENS, HEADS, dtype=torch.bool) if counted else None
    config = TurboQuantConfig(HEAD_DIM, bits, bits)
    keys[7, 1, 3] = values[9, 0, 5] = bad
    codec = LayerCodec.calibrate(config, keys, values, counts)
    stored_keys, stored_values = codec.quantize(keys, values)
    broken = torch.zeros(HEADS, NUM_TOKENS, dtype=torch.bool)
    broken[1, 7] = True
    assert torch.equal(~codec.dequantize_keys(heads_first(stored_keys)).isfinite().any(-1), broken)
    broken = torch.zeros(HEADS, NUM_TOKENS, dtype=torch.bool)
    broken[0, 9] = True
    assert torch.equal(~codec.dequantize_values(heads_first(stored_values)).isfinite().any(-1), broken)
    without = torch.arange(NUM_TOKENS) != 7
    torch.testing.assert_close(codec.key_transform.mean[1], keys[without, 1].mean(0))
    clean_values = values.clone()
    clean_values[9, 0] = 0
    clean = LayerCodec.calibrate(config, keys, clean_values, counts)
    assert codec.value_order is None or torch.equal(codec.value_order, clean.value_order)


@pytest.mark.parametrize("row_counts", [[False, False], [False, True]], ids=["of both heads", "of one"])
def test_vectors_that_do_not_count_say_nothing(row_counts):
    states = [gaussian(NUM_TOKENS * HEADS, HEAD_DIM, s).view(NUM_TOKENS, HEADS, HEAD_DIM) for s in (1, 2)]
    counts = torch.ones(NUM_TOKENS, HEADS, dtype=torch.bool)
    counts[:10] = torch.tensor(row_counts)
    others = [torch.where(counts[..., None], x, 100 * x.flip(-1)) for x in states]
    expected, found = (LayerCodec.calibrate(TurboQuantConfig(HEAD_DIM, 2.5, 3.5), *x, counts) for x in (states, others))
    assert all(map(torch.equal, found.tensors(), expected.tensors()))
    assert len(found.tensors()) == 3


@pytest.mark.parametrize("rules", [("norm", "unbiased"), ("unbiased", "least_squares"), ("least_squares", "norm")])
@pytest.mark.parametrize("bits", [4, 2.5])
def test_keys_and_values_have_scales_of_their_own_rules(bits, rules):
    states = [gaussian(NUM_TOKENS * HEADS, HEAD_DIM, s).view(NUM_TOKENS, HEADS, HEAD_DIM) for s in (1, 2)]
    codec = LayerCodec.calibrate(TurboQuantConfig(HEAD_DIM, bits, bits, *rules, center_keys=False), *states)
    orders = codec.key_order, codec.value_order
    for given, rule, order, stored in zip(states, rules, orders, codec.quantize(*states), strict=True):
        whole = order is None
        quantizer = MSEQuantizer(HEAD_DIM, bits, rule) if whole else OutlierQuantizer(bits, order, rule)
        assert torch.equal(stored.scales, quantizer.quantize(given).scales)


def heads_first(stored):
    return stored.map(lambda x: x.transpose(0, 1))
