import json

import pytest
import torch
from transformers import DynamicCache

from turboquant_hf import TurboQuantCache
from turboquant_hf.memory import memory_report


@pytest.fixture
def cache(tiny_config):
    cache = TurboQuantCache(tiny_config())
    for layer_idx in range(2):
        states = torch.randn(3, 2, 100, 64)
        cache.update(states, states, layer_idx)
    return cache


def test_layers_and_sums(cache):
    report = cache.memory_report()
    for layer in report.layers:
        assert layer.num_tokens == 300
        assert layer.token_nbytes == 300 * 2 * 68
        assert layer.reserved_nbytes == 3 * 28 * 2 * 68
        assert layer.fixed_nbytes == 3 * 2 * 64 * 4
        assert layer.bf16_nbytes == 300 * 2 * 64 * 2 * 2
    assert report.nbytes == cache.nbytes
    assert report.compression == pytest.approx(report.bf16_nbytes / cache.nbytes)
    assert report.bytes_per_token == pytest.approx(cache.nbytes / 300)


def test_native_caches_are_measured_too(tiny_config):
    cache = DynamicCache(config=tiny_config())
    states = torch.randn(1, 2, 100, 64)
    cache.update(states, states, 0)
    report = memory_report(cache.layers)
    assert report.nbytes == 2 * states.untyped_storage().nbytes()
    assert report.compression == 0.5
    assert report.layers[0].kind == "DynamicLayer"


def test_linear_attention_states_count():
    class Layer:
        def __init__(self):
            self.recurrent_states = {0: torch.zeros(4, 5)}
            self.conv_states = [torch.zeros(3)]

    assert memory_report([Layer()]).nbytes == 4 * (20 + 3)


def test_an_empty_cache_reports_nothing(tiny_config):
    report = TurboQuantCache(tiny_config()).memory_report()
    assert report.nbytes == 0
    assert "nan" not in str(report)
    assert set(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == {"nbytes", "bf16_nbytes", "layers"}


def test_json(cache):
    data = json.loads(json.dumps(cache.memory_report().to_dict(), allow_nan=False))
    assert data["nbytes"] == cache.nbytes
    assert len(data["layers"]) == 2


def test_table_in_terminal_text_and_notebook(cache):
    report = cache.memory_report()
    for rendered in (str(report), report._repr_html_()):
        assert "turboquant 4/4 bits" in rendered
        assert f"{cache.nbytes:,}" in rendered
    assert report._repr_html_().startswith("<pre")
