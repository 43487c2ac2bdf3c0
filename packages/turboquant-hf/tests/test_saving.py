import copy
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from zlib import crc32

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Gemma3TextConfig

from turboquant_core.model_identity import ModelIdentity
from turboquant_core.testing.damage import damaged_bytes, damaged_json, header_of, read_or_refused, with_header
from turboquant_hf import TurboQuantCache
from turboquant_hf.saving import header as header_module
from turboquant_hf.saving.file import save_layers
from turboquant_hf.saving.header import HEADER, checksum_of
from turboquant_hf.storage.full_precision import FullPrecision


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
def test_a_loaded_cache_continues_as_the_saved_one(model, prompt, tmp_path, preset, options, assert_says_the_same):
    cache = prefilled(model, prompt, preset, **options)
    cache.crop(-2)
    prompt = prompt[:, :-2]
    cache.save(tmp_path / "prefix.safetensors")
    loaded = TurboQuantCache.load(tmp_path / "prefix.safetensors", model.config)
    assert loaded.get_seq_length() == 38
    assert loaded.nbytes == cache.nbytes
    longer = torch.cat([prompt, torch.full((2, 1), 7)], dim=1)
    assert_says_the_same(model, longer, loaded, cache)


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


def rewrite(path, change_tensors=lambda tensors: None, change_header=lambda header: None, marker=HEADER):
    """Write a file again with changes, and with checksums that fit: whoever wrote it meant it."""
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
    tensors, header = load_file(path), json.loads(metadata[HEADER])
    change_tensors(tensors)
    for name, tensor in tensors.items():
        if name.startswith("layers."):
            _, index, short = name.split(".")
            header["layers"][int(index)]["checksums"][short] = crc32(tensor.flatten().view(torch.uint8).numpy())
    change_header(header)
    header["checksum"] = checksum_of({name: value for name, value in header.items() if name != "checksum"})
    save_file(tensors, path, metadata={marker: json.dumps(header)})


def all_layers(**values):
    """A change of a header in every layer."""

    def change(header):
        for layer in header["layers"]:
            layer.update(values)

    return change


def kept(**values):
    """A change of what is kept in every layer."""

    def change(header):
        for layer in header["layers"]:
            layer["kept"].update(values)

    return change


def config(**values):
    """A change of the configuration of every layer."""

    def change(header):
        for layer in header["layers"]:
            layer["config"].update(values)

    return change


def in_layer(index, **values):
    return lambda header: header["layers"][index].update(values)


def without_codes(tensors):
    del tensors["layers.1.key_codes"]


def with_short_codes(tensors):
    tensors["layers.0.key_codes"] = tensors["layers.0.key_codes"][..., :-2].contiguous()


def with_few_scales(tensors):
    tensors["layers.1.value_scales_least_squares"] = tensors["layers.1.value_scales_least_squares"][:, 1:].contiguous()


def without_mean(tensors):
    del tensors["layers.0.key_mean"]


def with_few_recent(tensors):
    tensors["layers.1.kept_values"] = tensors["layers.1.kept_values"][:, :, 1:].contiguous()


def with_more(tensors):
    tensors["layers.2.key_codes"] = tensors["layers.0.key_codes"].clone()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"marker": "pt"}, "no cache that TurboQuantCache.save wrote"),
        (
            {"change_header": lambda header: header.update(version=10)},
            "format version is 10, and .* reads 11.* save it again",
        ),
        ({"change_header": lambda header: header.update(storage_format=1)}, "of storage format 1, and .* reads 2"),
        ({"change_header": lambda header: header["model"].clear()}, "the fields of the model must be"),
        ({"change_header": lambda header: header["heads"].clear()}, r"a model with \{\}, and this model has"),
        ({"change_header": lambda header: header["layers"].pop()}, "1 layers, and this model has 2"),
        ({"change_header": lambda header: header.update(layers={})}, r"layers of the header is \{\}"),
        ({"change_header": lambda header: header.update(more=1)}, "the fields of the header must be"),
        ({"change_header": in_layer(0, num_tokens=41)}, "layer 1: num_tokens is 40, and 41 in layer 0"),
        ({"change_header": in_layer(1, kept=None)}, "layer 1: sink_tokens is 0, and 2 in layer 0"),
        ({"change_header": all_layers(kept=None)}, "it has a tensor 'layers.0.kept_keys', of no layer"),
        ({"change_header": all_layers(num_tokens=99)}, r"key_codes is U8 \[4, 40, 32\] and must be U8 \[4, 99, 32\]"),
        ({"change_header": all_layers(num_tokens=39)}, r"key_codes is U8 \[4, 40, 32\] and must be U8 \[4, 39, 32\]"),
        ({"change_header": all_layers(num_tokens=64)}, r"key_codes is U8 \[4, 40, 32\] and must be U8 \[4, 64, 32\]"),
        ({"change_header": all_layers(num_tokens=0)}, "layer 0: num_tokens is 0"),
        ({"change_header": all_layers(num_tokens=True)}, "num_tokens of layer 0 is True"),
        ({"change_header": all_layers(batch_size=4, num_kv_heads=1)}, "layers.0.kept_keys is F32"),
        ({"change_header": all_layers(dtype="float16")}, "layers.0.kept_keys is F32 .* must be F16"),
        ({"change_header": all_layers(dtype="load")}, "dtype is 'load'; keys and values are one of float16"),
        ({"change_header": kept(recent_tokens=4_000_000)}, "recent_tokens are 2 and 4,000,000; together"),
        ({"change_header": kept(recent_tokens=10**11)}, "recent_tokens are 2 and 100,000,000,000"),
        ({"change_header": kept(recent_tokens=2.0)}, "recent_tokens of what is kept of layer 0 is 2.0"),
        ({"change_header": kept(sink_tokens=-5)}, "sink_tokens and recent_tokens are -5 and 6"),
        ({"change_header": kept(sink_tokens=40)}, "num_kept is 16, and .* it is 40 to 40"),
        ({"change_header": kept(recent_tokens=20)}, "num_kept is 16, and .* it is 21 to 30"),
        ({"change_header": kept(num_kept=0)}, "num_kept is 0, and .* it is 7 to 16"),
        (
            {"change_header": all_layers(given=["key_mean"])},
            r"key_mean is F32 \[4, 64\] and must be F32 \[2, 64",
        ),
        ({"change_header": all_layers(given=["key_scale"])}, "layers.0.key_scale is missing"),
        ({"change_header": all_layers(given=[{}])}, r"given names \{\}; keys go through key_mean, key_scale"),
        ({"change_header": all_layers(given="key_mean")}, "given of layer 0 is 'key_mean'"),
        ({"change_header": config(head_dim=64.0)}, "head_dim of the configuration of layer 0 is 64.0"),
        ({"change_header": config(head_dim=72)}, "layers.0.key_codes is U8"),
        ({"change_header": config(key_bits=3, value_bits=5)}, r"layers.0.key_codes is U8 \[4, 40, 32\]"),
        ({"change_header": config(center_keys=1)}, "center_keys of the configuration of layer 0 is 1"),
        ({"change_header": config(key_scale="none")}, "scale"),
        ({"change_header": config(key_scale="norm")}, "layers.0.key_scales_norm is missing"),
        ({"change_header": config(value_scale="unbiased")}, "layers.0.value_scales_unbiased is missing"),
        ({"change_header": config(key_bits=7)}, "key_bits is 7; it must be one of"),
        ({"change_tensors": without_codes}, "layers.1.key_codes is missing"),
        ({"change_tensors": with_short_codes}, r"layers.0.key_codes is U8 \[4, 40, 30\]"),
        ({"change_tensors": with_few_scales}, r"layers.1.value_scales_least_squares is F16 \[4, 39, 1\]"),
        ({"change_tensors": without_mean}, "layers.0.key_mean is missing"),
        ({"change_tensors": with_few_recent}, r"layers.1.kept_values is F32 \[2, 2, 15, 64\] and must be F32"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:30],
)
def test_what_does_not_fit_is_refused_by_name(tiny_model, saved, changes, message):
    rewrite(saved, **changes)
    with pytest.raises(ValueError, match=message) as error:
        TurboQuantCache.load(saved, tiny_model.config)
    assert str(saved) in str(error.value)
    assert "save it again" in str(error.value)


def test_a_file_that_was_written_again_with_nothing_changed_is_read(tiny_model, saved):
    rewrite(saved)
    assert TurboQuantCache.load(saved, tiny_model.config).get_seq_length() == 40


def test_channels_are_named_once_each(tiny_model, prompt, tmp_path):
    path = tmp_path / "prefix.safetensors"
    prefilled(tiny_model, prompt, "tq2.5").save(path)

    def twice(tensors):
        tensors["layers.1.key_order"][0, 0] = tensors["layers.1.key_order"][0, 1]

    rewrite(path, twice)
    with pytest.raises(ValueError, match="channel_order must name each of the 64 channels once"):
        TurboQuantCache.load(path, tiny_model.config)


def test_every_byte_counts(tiny_model, saved):
    content = saved.read_bytes()
    body = 8 + int.from_bytes(content[:8], "little")
    for at in (*range(body, len(content), 997), len(content) - 1):
        saved.write_bytes(content[:at] + bytes([content[at] ^ 0x10]) + content[at + 1 :])
        with pytest.raises(ValueError, match="is damaged: its checksum is another"):
            TurboQuantCache.load(saved, tiny_model.config)


def test_rows_begin_within_themselves(tiny_model, prompt, tmp_path):
    model = copy.deepcopy(tiny_model)
    model.set_attn_implementation("turboquant")
    cache = TurboQuantCache(model.config)
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    with torch.no_grad():
        model(prompt, attention_mask=mask, past_key_values=cache)
    path = tmp_path / "prefix.safetensors"
    cache.save(path)
    loaded = TurboQuantCache.load(path, model.config)
    assert loaded.layers[1].store.length.row_starts.tolist() == [9, 0]
    tensors = load_file(path)
    tensors["row_starts"][0] = 41

    def change(stored):
        stored.update(tensors)

    checksum = crc32(tensors["row_starts"].view(torch.uint8).numpy())
    rewrite(path, change, lambda header: header.update(row_starts=checksum))
    with pytest.raises(ValueError, match="row_starts are not all from 0 to the 40 tokens"):
        TurboQuantCache.load(path, model.config)


def test_layers_that_disagree_are_not_saved(tiny_model, prompt, tmp_path):
    cache = prefilled(tiny_model, prompt)
    cache.layers[1].update(*torch.randn(2, 2, 2, 1, 64))
    with pytest.raises(ValueError, match="layer 1: num_tokens is 41, and 40 in layer 0"):
        save_layers(cache.layers, tiny_model.config, tmp_path / "prefix.safetensors")
    assert not list(tmp_path.iterdir())


def test_more_kept_tokens_than_a_model_reads_are_not_saved(tiny_model, prompt, tmp_path):
    cache = prefilled(tiny_model, prompt, recent_tokens=8192)
    with pytest.raises(ValueError, match="together they are 1 to 8,192"):
        cache.save(tmp_path / "prefix.safetensors")


def test_a_full_disk_leaves_the_file_that_was_there(tiny_model, prompt, saved, monkeypatch):
    content = saved.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("turboquant_hf.saving.file.save_file", fail)
    with pytest.raises(OSError, match=r"cannot write .*prefix\.safetensors: No space left on device"):
        prefilled(tiny_model, prompt).save(saved)
    assert saved.read_bytes() == content
    assert list(saved.parent.iterdir()) == [saved]


def test_no_file_but_a_saved_cache_is_replaced_unasked(tiny_model, prompt, saved, tmp_path):
    cache = prefilled(tiny_model, prompt)
    content = saved.read_bytes()
    cache.save(saved)
    assert saved.read_bytes() != content
    foreign = tmp_path / "foreign.txt"
    foreign.touch()
    cache.save(foreign)
    for write in (lambda path: path.write_text("mine"), lambda path: save_file({"a": torch.zeros(1)}, path)):
        write(foreign)
        content = foreign.read_bytes()
        with pytest.raises(FileExistsError, match=r"foreign.txt is no saved cache.* overwrite=True"):
            cache.save(foreign)
        assert foreign.read_bytes() == content
    cache.save(foreign, overwrite=True)
    assert TurboQuantCache.load(foreign, tiny_model.config).get_seq_length() == 40


def test_a_pipe_is_refused_and_written_to_if_asked(tiny_model, prompt, saved, tmp_path):
    cache = prefilled(tiny_model, prompt)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # Open for both, so that nobody waits for the other end.
    end = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        with pytest.raises(FileExistsError, match=r"pipe is no saved cache.* overwrite=True"):
            cache.save(pipe)
        with pytest.raises(BlockingIOError):
            os.read(end, 1)
        with ThreadPoolExecutor(1) as threads:
            saving = threads.submit(cache.save, pipe, overwrite=True)
            content = b""
            while not saving.done():
                with suppress(BlockingIOError):
                    content += os.read(end, 1 << 16)
        saving.result()
        with suppress(BlockingIOError):
            content += os.read(end, 1 << 16)
    finally:
        os.close(end)
    cache.save(saved)
    assert content == saved.read_bytes()
    assert pipe.is_fifo()


def test_a_truncated_file_is_refused(tiny_model, saved):
    saved.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"no safetensors file, or is truncated.* save it again"):
        TurboQuantCache.load(saved, tiny_model.config)


@pytest.mark.parametrize("header", ["{}", "[]", "nonsense", "[" * 200_000, "NaN", '{"version": 10}', '{"version": 3}'])
def test_a_damaged_header_is_refused_by_name(tiny_model, tmp_path, header):
    path = tmp_path / "cache.safetensors"
    save_file({"a": torch.zeros(1)}, path, metadata={HEADER: header})
    with pytest.raises(ValueError, match=r"cache.safetensors holds no saved cache .*: it.* save it again"):
        TurboQuantCache.load(path, tiny_model.config)


def test_a_foreign_file_is_refused(tiny_model, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match="no safetensors file"):
        TurboQuantCache.load(tmp_path / "notes.txt", tiny_model.config)


def test_no_file_is_an_os_error(tiny_model, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*nothing, and so no saved cache\. Fill"):
        TurboQuantCache.load(tmp_path / "nothing", tiny_model.config)


def test_another_model_is_refused(tiny_config, saved):
    with pytest.raises(ValueError, match=r"is another .*vocab_size 1500 and 1501"):
        TurboQuantCache.load(saved, tiny_config(vocab_size=1501))
    with pytest.raises(ValueError, match=r"'num_key_value_heads': 2, .* this model has .*'num_key_value_heads': 4"):
        TurboQuantCache.load(saved, tiny_config(num_key_value_heads=4))
    with pytest.raises(ValueError, match="rope_theta 10000 and 500000"):
        TurboQuantCache.load(saved, tiny_config(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LINEAR["original_max_position_embeddings"] = 8192
YARN = {**LINEAR, "rope_type": "yarn"}
LLAMA3 = {**LINEAR, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FULL = {"layer_types": ["full_attention"] * 2}


@pytest.mark.parametrize(
    ("config", "mine", "its", "message"),
    [
        ("Llama", {"rope_parameters": LINEAR}, {"rope_parameters": YARN}, 'rope_type "linear" and "yarn"'),
        ("Llama", {"rope_parameters": YARN}, {"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast none and 16"),
        (
            "StableLm",
            {"partial_rotary_factor": 0.5},
            {"partial_rotary_factor": 0.25},
            "partial_rotary_factor 0.5 and 0.25",
        ),
        (
            "Llama",
            {"rope_parameters": LLAMA3},
            {"rope_parameters": {**LLAMA3, "high_freq_factor": 8.0}},
            "high_freq_factor 4 and 8",
        ),
        (
            "Gemma3Text",
            {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_theta": 1e4}}},
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 1e4}}},
            'full_attention.rope_type "linear" and "yarn"',
        ),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, {"no_rope_layers": [0, 1]}, r"no_rope_layers \[1, 0\] and \[0, 1\]"),
        (
            "Cohere2",
            {"layer_types": ["full_attention", "sliding_attention"]},
            {"layer_types": ["sliding_attention", "full_attention"]},
            "layer_types",
        ),
        ("Exaone4", FULL | {"sliding_window": None}, FULL | {"sliding_window": 64}, "has_sliding_window 0 and 1"),
    ],
)
def test_a_model_of_another_rotary_embedding_is_refused(config, mine, its, message):
    def identity(**options):
        sizes = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
        made = getattr(transformers, f"{config}Config")(num_hidden_layers=2, **copy.deepcopy(sizes | options))
        return header_module._identity(made)

    identity(**mine).check_is(identity(**mine), "it", "")
    with pytest.raises(ValueError, match=message):
        ModelIdentity.from_json(identity(**mine).to_json()).check_is(identity(**its), "it", "")


def test_a_cache_of_another_rotary_embedding_is_refused(tiny_config, saved):
    halved = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"partial_rotary_factor none and 0\.5"):
        TurboQuantCache.load(saved, tiny_config(rope_parameters=halved))


def test_an_empty_cache_is_not_saved(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="layer 0 holds no tokens"):
        TurboQuantCache(tiny_model.config).save(tmp_path / "prefix.safetensors")


def test_windows_are_not_saved(tmp_path):
    config = Gemma3TextConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], head_dim=64)
    with pytest.raises(ValueError, match="layer 0 is a TurboQuantSlidingLayer; only caches of full-attention"):
        TurboQuantCache(config).save(tmp_path / "prefix.safetensors")


@pytest.fixture(scope="module")
def content(tiny_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "prefix.safetensors"
    cache = TurboQuantCache(tiny_model.config, sink_tokens=2, recent_tokens=6)
    for index in range(2):
        cache.update(*torch.randn(2, 1, 2, 40, 64, generator=torch.Generator().manual_seed(1)), index)
    cache.save(path)
    return path.read_bytes()


randoms = st.randoms(use_true_random=False)
AGAIN = "save it again"


@given(random=randoms)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_refused(tiny_model, content, tmp_path, random):
    damaged = damaged_bytes(content, random)
    loaded = read_or_refused(lambda path: TurboQuantCache.load(path, tiny_model.config), tmp_path / "a", damaged, AGAIN)
    assert (loaded is not None) == (damaged == content)


@given(random=randoms)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_header_with_another_value_and_a_checksum_that_fits(tiny_model, content, tmp_path, monkeypatch, random):
    header = header_of(content)
    stored = json.loads(header["__metadata__"][HEADER])
    stored.pop("checksum")
    text = damaged_json(stored, random)
    # Where it is JSON that has an end and is an object.
    with suppress(ValueError, RecursionError, AttributeError):
        changed = json.loads(text)
        text = json.dumps({**changed, "checksum": checksum_of(changed)})
    header["__metadata__"][HEADER] = text
    empty = FullPrecision.empty

    def bounded(sizes, *options):
        assert sizes.first + sizes.recent <= tiny_model.config.max_position_embeddings
        return empty(sizes, *options)

    monkeypatch.setattr(FullPrecision, "empty", bounded)
    damaged = with_header(content, json.dumps(header))
    loaded = read_or_refused(lambda path: TurboQuantCache.load(path, tiny_model.config), tmp_path / "a", damaged, AGAIN)
    if loaded is not None:
        keys, values = loaded.update(*torch.randn(2, 1, 2, 1, 64), 0)
        assert keys.isfinite().all()
        assert values.isfinite().all()
