import json
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, MistralConfig

from turboquant_hf import TurboQuantCache
from turboquant_hf.memory import memory_report

README = Path(__file__).parents[3] / "README.md"


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
    assert str(report) == "KV cache: empty"
    assert "nan" not in report.table()
    assert set(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == {"nbytes", "bf16_nbytes", "layers"}


def test_json(cache):
    data = json.loads(json.dumps(cache.memory_report().to_dict(), allow_nan=False))
    assert data["nbytes"] == cache.nbytes
    assert len(data["layers"]) == 2


def test_a_report_is_one_line(cache):
    report = cache.memory_report()
    (line,) = str(report).splitlines()
    allocated = f"KV cache: {cache.nbytes / 2**10:.2f} KiB"
    room = f"{sum(layer.reserved_nbytes for layer in report.layers) / 2**10:.2f} KiB room for tokens to come"
    assert line.startswith(f"{allocated}, of which ")
    assert room in line
    assert f"bf16 takes {report.bf16_nbytes / 2**10:.2f} KiB ({report.compression:.2f}x)." in line
    assert line.endswith(f" At 8,192 tokens: {report.compression_at(8192):.2f}x.")


def test_the_readme_shows_what_its_first_cache_prints(tiny_config):
    # Of SmolLM2-135M's shape: the prompt's six tokens and 99 of the hundred that follow, one by one.
    cache = TurboQuantCache(
        tiny_config(num_hidden_layers=30, num_key_value_heads=3, num_attention_heads=3, hidden_size=192)
    )
    for num_tokens in [6] + [1] * 99:
        for layer_idx in range(30):
            cache.update(*torch.zeros(2, 1, 3, num_tokens, 64), layer_idx)
    assert f"\n{cache.memory_report()}\n" in README.read_text(encoding="utf-8")


def test_layers_that_are_equal_share_a_row(cache, tiny_config):
    title, _, *rows = cache.memory_report().table().splitlines()
    assert title == "Allocated bytes of every layer"
    assert [row.split("  ")[0] for row in rows] == ["0 to 1, each", rows[1].split("  ")[0]]
    assert f"{cache.nbytes:,}" in rows[1]
    other = TurboQuantCache(tiny_config(), layer_bits={1: (8, 3)})
    for layer_idx in range(2):
        other.update(*torch.randn(2, 1, 2, 100, 64), layer_idx)
    assert [row.split()[0] for row in other.memory_report().table().splitlines()[2:]] == ["0", "1", "all"]


def test_the_compression_of_a_longer_prompt_is_that_which_it_has(tiny_config):
    caches = [TurboQuantCache(tiny_config(num_hidden_layers=3), skip_layers=[1]) for _ in range(2)]
    for cache, num_tokens in zip(caches, (100, 1024), strict=True):
        for layer_idx in range(3):
            cache.update(*torch.randn(2, 2, 2, num_tokens, 64, dtype=torch.bfloat16), layer_idx)
    short, long = (cache.memory_report() for cache in caches)
    assert short.compression_at(1024) == pytest.approx(long.compression)
    assert short.compression < long.compression


@pytest.mark.parametrize("options", [{"max_length": 128}, {"sliding_window": 16}])
def test_nothing_is_said_of_a_longer_prompt_where_layers_do_not_grow(tiny_config, options):
    window = {"sliding_window": options.pop("sliding_window")} if "sliding_window" in options else {}
    cache = TurboQuantCache(tiny_config(MistralConfig, **window) if window else tiny_config(), **options)
    for layer_idx in range(2):
        cache.update(*torch.randn(2, 1, 2, 100, 64), layer_idx)
    assert "At 8,192 tokens" not in str(cache.memory_report())


def test_a_notebook_shows_line_and_table(cache):
    report = cache.memory_report()
    rendered = report._repr_html_()
    assert rendered.startswith("<pre")
    assert str(report) in rendered
    assert "turboquant 4/4 bits" in rendered
