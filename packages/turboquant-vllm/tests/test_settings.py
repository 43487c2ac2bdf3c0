import re
from types import SimpleNamespace

import pytest
import torch
import transformers

from turboquant_core import TurboQuantConfig
from turboquant_core.calibration import Calibration, write_calibration
from turboquant_core.key_transform import KeyTransform
from turboquant_core.model_identity import ModelIdentity
from turboquant_vllm import settings
from turboquant_vllm.settings import Settings, process_settings


def test_four_bits_centred_unless_told_otherwise():
    config = Settings.of({}).cache_config(head_dim=128)
    assert (config.key_bits, config.value_bits, config.center_keys) == (4, 4, True)
    assert config.slot_bytes == 132


@pytest.mark.parametrize(
    ("chosen", "bits"),
    [({"preset": "k6v4"}, (6, 4)), ({"preset": "tq3"}, (3, 3)), ({"key_bits": 8}, (8, 4)), ({"value_bits": 2}, (4, 2))],
)
def test_presets_and_bits(chosen, bits):
    config = Settings.of({"turboquant": chosen}).cache_config(head_dim=64)
    assert (config.key_bits, config.value_bits) == bits


@pytest.mark.parametrize("center_keys", [True, False])
def test_a_layer_may_have_bits_of_its_own(center_keys):
    found = Settings(center_keys=center_keys).cache_config(64, (6, 3))
    assert found == TurboQuantConfig(64, 6, 3, center_keys=center_keys)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"preset": "tq9"}, "preset is 'tq9'; it must be one of tq4"),
        (
            {"bits": 4},
            "turboquant has 'bits'; it may have preset, key_bits, value_bits, center_keys, calibration, layer_bits",
        ),
        ({"preset": ["tq4"]}, "preset is .'tq4'.; it must be one of tq4"),
        ({"preset": {}}, "preset is {}; it must be one of tq4"),
        ({"key_bits": 7}, "key_bits is 7; it must be one of"),
        ({"key_bits": 4.0}, "key_bits is 4.0; it must be an int from 2 to 8. The kernels read codes of whole bits."),
        ({"value_bits": 3.5}, "value_bits is 3.5; it must be an int from 2 to 8"),
        ({"value_bits": True}, "value_bits is True"),
        ({"value_bits": "4"}, "value_bits is '4'"),
        ({"preset": "tq2.5"}, "stores 2.5 bits, which the kernels do not read"),
        ({"center_keys": "yes"}, "center_keys is 'yes'; it must be True or False"),
        ({"calibration": True}, "calibration is True; it must be the path of a file"),
        ({"calibration": ""}, "calibration is ''; it must be the path of a file"),
        ({"calibration": "m", "center_keys": False}, "center_keys is false and calibration is 'm'.*give one"),
        ({"layer_bits": 4}, "layer_bits is 4; it must be the path of a file"),
        ({"layer_bits": "f", "preset": "tq3"}, "preset is tq3 and layer_bits is 'f', a file of bits; give one"),
        ({"layer_bits": "f", "key_bits": 3}, "key_bits is 3 and layer_bits is 'f'"),
        ({"layer_bits": "f", "value_bits": 3}, "value_bits is 3 and layer_bits is 'f'"),
        ("tq4", "turboquant is 'tq4'; it must be an object"),
    ],
)
def test_what_is_unknown_is_named(chosen, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        Settings.of({"turboquant": chosen})


@pytest.mark.parametrize(
    "name",
    [
        "Turboquant",
        "turbo_quant",
        "turbo_quant_vllm",
        "turboquant-vllm",
        "turboquant_vllm",
        "TurboQuantConfig",
        "turboqaunt",
        "turboquan",
    ],
)
def test_a_slip_in_the_name_of_the_settings_is_refused(name):
    with pytest.raises(ValueError, match=f"additional_config has '{name}', which nothing reads; write 'turboquant'"):
        Settings.of({name: {"preset": "tq3"}})


@pytest.mark.parametrize("beside", [{}, {"turboquant": {"preset": "tq3"}}])
@pytest.mark.parametrize(
    ("setting", "written"),
    [
        ({"key_bits": 8}, '{"turboquant": {"key_bits": 8}}'),
        ({"value_bits": None}, '{"turboquant": {"value_bits": null}}'),
        ({"center_keys": False}, '{"turboquant": {"center_keys": false}}'),
        ({"layer_bits": "bits.json"}, '{"turboquant": {"layer_bits": "bits.json"}}'),
        ({"preset": "k8v4"}, '{"turboquant": {"preset": "k8v4"}}'),
        ({"preset": "TQ2"}, '{"turboquant": {"preset": "tq2"}}'),
        ({"preset": "tq3.5"}, '{"turboquant": {"preset": "tq3.5"}}'),
        ({"calibration": "means.safetensors"}, '{"turboquant": {"calibration": "means.safetensors"}}'),
    ],
)
def test_a_setting_in_the_wrong_place_is_refused(setting, written, beside):
    (name,) = setting
    message = f"additional_config has '{name}', which nothing reads there; write {written}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings.of({**beside, **setting})


def test_settings_of_others_are_left_alone():
    others = {"torchair_graph_config": {}, "quantization": 1, "turbo": 1, "turbomind": {}, "turboquark": 1, "": 0, 3: 4}
    others |= {"preset": "throughput", "calibration": {"samples": 512}}
    assert Settings.of({**others, "turboquant": {"preset": "tq3"}}) == Settings(preset="tq3")


@pytest.mark.parametrize("given", ['{"turboquant": {"preset": "tq2"}}', b"{}", ""])
def test_json_text_is_refused(given):
    with pytest.raises(ValueError, match=r"additional_config is the text .*; give an object such as {"):
        Settings.of(given)


def test_a_preset_may_be_given_as_the_type_of_the_cache():
    assert Settings.of({}, "k8v4") == Settings(preset="k8v4")
    assert Settings.of({"turboquant": {"center_keys": False}}, "tq3") == Settings(preset="tq3", center_keys=False)
    assert Settings.of({}, "bfloat16") == Settings()
    # A platform's own kind of configuration has no settings of ours.
    assert Settings.of(object(), "bfloat16") == Settings()
    with pytest.raises(ValueError, match="kv_cache_dtype is tq3 and turboquant has preset 'tq4'; give one"):
        Settings.of({"turboquant": {"preset": "tq4"}}, "tq3")
    with pytest.raises(ValueError, match="preset is tq3 and layer_bits is 'f'"):
        Settings.of({"turboquant": {"layer_bits": "f"}}, "tq3")


def test_an_engine_says_what_a_user_chose():
    cache = SimpleNamespace(cache_dtype="tq3")
    engine = SimpleNamespace(additional_config={"turboquant": {"center_keys": False}}, cache_config=cache)
    assert Settings.of_engine(engine) == Settings(preset="tq3", center_keys=False)


def test_what_an_engine_said_holds_until_the_next_one_says_otherwise(monkeypatch):
    monkeypatch.setattr(settings, "_latest", Settings())
    for preset in ("tq3", "tq2"):
        engine = SimpleNamespace(additional_config={}, cache_config=SimpleNamespace(cache_dtype=preset))
        for config in (engine, None):
            monkeypatch.setattr(settings, "current_config", lambda config=config: config)
            assert process_settings() == Settings(preset=preset)


def calibration(path, orders):
    """A file of a calibration with as many layers, which order their channels or do not."""
    random = torch.Generator().manual_seed(0)
    layers = {
        index: KeyTransform(
            scale=torch.ones(2, 64), order=torch.rand(2, 64, generator=random).argsort(-1) if has else None
        )
        for index, has in enumerate(orders)
    }
    model = ModelIdentity.of(transformers.LlamaConfig(num_hidden_layers=len(orders)), "theirs")
    write_calibration(path, Calibration(layers, model, "theirs", num_tokens=100))
    return str(path)


def test_a_calibration_that_orders_all_layers_splits_keys(tmp_path):
    path = calibration(tmp_path / "file.safetensors", [True, True])
    for preset in ("tq4", "tq3", "tq2"):
        settings = Settings(preset, calibration=path)
        assert settings.cache_config(64).key_split
        assert settings.cache_config(64).slot_bytes == Settings(preset).cache_config(64).slot_bytes + 2
        assert not Settings(preset).cache_config(64).key_split
        assert not settings.cache_config(32).key_split, "halves of 16 are not coded"
    assert not Settings("k8v4", calibration=path).cache_config(64).key_split
    assert Settings(layer_bits="bits.json", calibration=path).cache_config(64, (3, 2)).key_split


def test_a_layer_without_an_order_leaves_pages_of_one_size(tmp_path):
    settings = Settings(calibration=calibration(tmp_path / "file.safetensors", [True, False]))
    assert not settings.cache_config(64).key_split


def test_a_calibration_that_is_not_there_is_missed_where_its_model_is_known(tmp_path):
    settings = Settings(calibration=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="turboquant calibrate MODEL"):
        settings.cache_config(64)
