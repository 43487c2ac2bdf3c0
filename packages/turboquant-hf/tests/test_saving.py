import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig

from turboquant_hf import TurboQuantCache
from turboquant_hf.saving import HEADER


@pytest.fixture(scope="module", params=["sdpa", "turboquant"], ids=["dequantising", "fused"])
def model(request, tiny_model):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation(request.param)
    return model


def prefilled(model, prompt, *args, **kwargs):
    cache = TurboQuantCache(model.config, *args, **kwargs)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    return cache


def continuation(model, prompt, cache):
    ids = torch.cat([prompt, torch.full((2, 1), 7)], dim=1)
    return model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False, pad_token_id=0)


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("tq4", {}),
        ("tq3", {"sink_tokens": 3}),
        ("tq2.5", {"recent_tokens": 9}),
        ("k8v4", {"sink_tokens": 3, "recent_tokens": 9}),
        ("tq4", {"sink_tokens": 100, "recent_tokens": 9}),
        ("tq4", {"sink_tokens": 3, "recent_tokens": 100}),
    ],
)
def test_a_loaded_cache_continues_as_the_saved_one(model, prompt, tmp_path, preset, options):
    cache = prefilled(model, prompt, preset, **options)
    cache.crop(-2)
    prompt = prompt[:, :-2]
    cache.save(tmp_path / "prefix.safetensors")
    loaded = TurboQuantCache.load(tmp_path / "prefix.safetensors", model.config)
    assert loaded.get_seq_length() == 38
    assert loaded.nbytes == cache.nbytes
    assert torch.equal(continuation(model, prompt, loaded), continuation(model, prompt, cache))


def test_options_are_kept(tiny_model, prompt, tmp_path):
    cache = prefilled(tiny_model, prompt, key_bits=8, value_bits=3, center_keys=False, sink_tokens=5, recent_tokens=6)
    cache.save(tmp_path / "prefix.safetensors")
    loaded = TurboQuantCache.load(tmp_path / "prefix.safetensors", tiny_model.config)
    assert [layer.config for layer in loaded.layers] == [layer.config for layer in cache.layers]
    loaded.reset()
    with torch.no_grad():
        tiny_model(prompt, past_key_values=loaded)
    assert loaded.layers[0].config == cache.layers[0].config
    assert loaded.nbytes == cache.nbytes


def test_the_file_is_as_small_as_the_cache_and_holds_no_rest_of_other_tokens(tiny_model, prompt, tmp_path):
    cache = prefilled(tiny_model, prompt, recent_tokens=0)
    for name in ("a", "b"):
        cache.save(tmp_path / name)
        for layer in cache.layers:
            layer.update(*torch.randn(2, 2, 2, 9, 64))
        cache.crop(-9)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").stat().st_size < cache.nbytes + 4096


def test_recent_tokens_that_were_taken_back_are_not_in_the_file(tiny_model, prompt, tmp_path):
    cache = prefilled(tiny_model, prompt, sink_tokens=2, recent_tokens=6)
    for layer in cache.layers:
        layer.update(*torch.full((2, 2, 2, 5, 64), 1234.5))
    cache.crop(-5)
    cache.save(tmp_path / "prefix.safetensors")
    kept = [tensor for name, tensor in load_file(tmp_path / "prefix.safetensors").items() if "kept" in name]
    assert len(kept) == 4
    assert not any((tensor == 1234.5).any() for tensor in kept)


@pytest.fixture
def saved(tiny_model, prompt, tmp_path):
    path = tmp_path / "prefix.safetensors"
    prefilled(tiny_model, prompt, sink_tokens=2, recent_tokens=6).save(path)
    return path


def rewrite(path, change_tensors=lambda tensors: None, change_header=lambda header: None, marker="turboquant-hf cache"):
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    tensors, header = load_file(path), json.loads(metadata["turboquant-hf cache"])
    change_tensors(tensors)
    change_header(header)
    save_file(tensors, path, metadata={marker: json.dumps(header)})


def without_pages(tensors):
    del tensors["layers.1.pages"]


def with_short_pages(tensors):
    tensors["layers.0.pages"] = tensors["layers.0.pages"][..., :-2].contiguous()


def without_mean(tensors):
    del tensors["layers.0.key_mean"]


def with_few_recent(tensors):
    tensors["layers.1.kept_values"] = tensors["layers.1.kept_values"][:, :, 1:].contiguous()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"marker": "pt"}, "no cache that TurboQuantCache.save wrote"),
        ({"change_header": lambda header: header.update(version=1)}, "format version 1; this one reads 4"),
        ({"change_header": lambda header: header.update(core="9.9")}, "codes of turboquant-core 9.9"),
        ({"change_header": lambda header: header["layers"].pop()}, "1 layers; this model has 2"),
        ({"change_header": lambda header: header["layers"][0].update(num_tokens=99)}, "pages of layer 0 are"),
        ({"change_tensors": without_pages}, "pages of layer 1 are missing"),
        ({"change_tensors": with_short_pages}, r"pages of layer 0 are torch.uint8 \[1, 4, 4350\]"),
        ({"change_tensors": without_mean}, "key_mean of layer 0 are missing and must be torch.float32"),
        ({"change_tensors": with_few_recent}, r"kept_values of layer 1 are torch.float32 \[2, 2, 15, 64\] and must be"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_what_does_not_fit_is_refused_by_name(tiny_model, saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(ValueError, match=message) as error:
        TurboQuantCache.load(saved, tiny_model.config)
    assert str(saved) in str(error.value)


def test_a_truncated_file_is_refused(tiny_model, saved):
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"no safetensors file, or a part of one .* save it again"):
        TurboQuantCache.load(saved, tiny_model.config)


@pytest.mark.parametrize("header", ["{}", "[]", "nonsense"])
def test_a_damaged_header_is_refused_by_name(tiny_model, tmp_path, header):
    path = tmp_path / "cache.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={HEADER: header})
    with pytest.raises(ValueError, match=r"cache.safetensors has a header that is not a cache's .* save it again"):
        TurboQuantCache.load(path, tiny_model.config)


def test_a_foreign_file_is_refused(tiny_model, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="no safetensors file"):
        TurboQuantCache.load(tmp_path / "notes.txt", tiny_model.config)


def test_no_file_is_an_os_error(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file"):
        TurboQuantCache.load(tmp_path / "nothing", tiny_model.config)


def test_another_model_is_refused(tiny_config, saved):
    with pytest.raises(ValueError, match="whose vocab_size is 1500; this model's is 1501"):
        TurboQuantCache.load(saved, tiny_config(vocab_size=1501))
    with pytest.raises(ValueError, match="whose num_key_value_heads is 2; this model's is 4"):
        TurboQuantCache.load(saved, tiny_config(num_key_value_heads=4))


def test_an_empty_cache_is_not_saved(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="layer 0 holds no tokens"):
        TurboQuantCache(tiny_model.config).save(tmp_path / "prefix.safetensors")


def test_windows_are_not_saved(tmp_path):
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], head_dim=64)
    with pytest.raises(ValueError, match="layer 0 is a TurboQuantSlidingLayer; only caches of full-attention"):
        TurboQuantCache(config).save(tmp_path / "prefix.safetensors")
