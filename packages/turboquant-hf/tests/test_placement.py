"""Everything is made in the type and on the device of the model, and nothing on torch's default device."""

import copy

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from turboquant_hf import TurboQuantCache

PROMPT, CALLS = 24, (1, 5, 12, 1)
LENGTH = PROMPT + sum(CALLS)
KEPT = {"sink_tokens": 3, "recent_tokens": 5}
CODES = {"sink_tokens": 0, "recent_tokens": 0}
OPTIONS = {
    "codes": CODES,
    "sinks": {**CODES, "sink_tokens": 3},
    "sinks and recent tokens": KEPT,
    "fractional bits": {**KEPT, "preset": "tq2.5"},
    "fractional bits, codes": {**CODES, "preset": "tq2.5"},
    "static": {**KEPT, "max_length": LENGTH},
    "static, codes": {**CODES, "max_length": LENGTH},
    "windows": {"window": 16},
    "windows, fractional bits": {"window": 16, "preset": "tq2.5"},
    "windows, static": {"window": 16, "max_length": LENGTH},
}


@pytest.fixture(scope="module")
def models(tiny_model, tiny_config):
    torch.manual_seed(7)
    windowed = MistralForCausalLM(tiny_config(MistralConfig, sliding_window=16)).eval()
    return {None: copy.deepcopy(tiny_model).bfloat16(), 16: windowed.bfloat16()}


@pytest.mark.parametrize("padded", [0, 4])
@pytest.mark.parametrize("attention", ["sdpa", "turboquant"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_cache_keeps_to_the_type_and_device_of_its_model(models, attention, options, padded):
    options = dict(options)
    window = options.pop("window", None)
    model = models[window]
    model.set_attn_implementation(attention)
    ids = torch.randint(1, 1500, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    mask = (torch.arange(LENGTH) >= torch.tensor([[0], [padded]])).long()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = TurboQuantCache(model.config, **options)

    def feed(start, stop):
        new = slice(start, stop)
        given = mask[:, :stop] if padded else None
        return model(ids[:, new], attention_mask=given, position_ids=positions[:, new], past_key_values=cache).logits

    with torch.no_grad(), torch.device("meta"):
        logits, start = [feed(0, PROMPT)], PROMPT
        for num_new in CALLS:
            logits.append(feed(start, start + num_new))
            start += num_new
        if window is None:
            cache.crop(-9)
            logits.append(feed(LENGTH - 9, LENGTH))
        cache.reorder_cache(torch.tensor([1, 0], device="cpu"))
        states = [part for layer in cache.layers for part in (layer.keys, layer.values)]
    for made in (*logits, *states):
        assert made.dtype == torch.bfloat16
        assert made.device == model.device
    assert all(each[:, padded:].isfinite().all() for each in logits)
