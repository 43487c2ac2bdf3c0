import json
import pickle
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from turboquant_core.calibration import Calibration, read_calibration, write_calibration
from turboquant_core.key_transform import KeyTransform
from turboquant_core.model_identity import ModelIdentity


def config(**changes):
    fields = {
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "vocab_size": 1000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.fixture
def model():
    return ModelIdentity.of(config(), "Qwen2ForCausalLM")


@pytest.fixture
def calibration(model):
    generator = torch.Generator().manual_seed(1)
    layers = {
        n: KeyTransform(torch.randn(*shape, generator=generator)) for n, shape in {0: (2, 64), 3: (1, 128)}.items()
    }
    return Calibration(layers=layers, model=model, source="a/model", num_tokens=2000)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "turboquant.safetensors"


@pytest.fixture
def written(path, calibration):
    write_calibration(path, calibration)
    return path


def rewrite(path, tensors=None, **metadata):
    """Write the file's tensors, or others, again with changed metadata; None removes a field."""
    kept = {
        "format": "turboquant-key-means",
        "format_version": "2",
        "model": ModelIdentity.of(config(), "Qwen2ForCausalLM").to_json(),
        "source": "a/model",
        "num_tokens": "2000",
    }
    fields = {name: value for name, value in {**kept, **metadata}.items() if value is not None}
    save_file(tensors or load_file(path), path, fields)


def refusal(path, model=None):
    with pytest.raises(ValueError, match=r"turboquant\.safetensors") as error:
        read_calibration(path, model)
    assert "turboquant calibrate MODEL --out FILE" in str(error.value)
    return str(error.value)


def test_what_is_written_is_read(written, calibration, model):
    found = read_calibration(written, model)
    assert found.layers.keys() == calibration.layers.keys()
    for index, transform in calibration.layers.items():
        assert torch.equal(found.layers[index].mean, transform.mean)
        assert found.layers[index].only_centres
    assert (found.model, found.source, found.num_tokens) == (model, "a/model", 2000)
    assert found.model.architecture == "Qwen2ForCausalLM"


def test_scale_and_order_are_tensors_of_their_own(path, model):
    scale = torch.tensor([2.0, 3.0])[:, None].repeat(1, 64)
    order = torch.arange(64).flip(0).repeat(2, 1)
    layers = {1: KeyTransform(scale=scale), 2: KeyTransform(torch.ones(2, 64), scale, order)}
    write_calibration(path, Calibration(layers, model, "a/model", 2000))
    names = ["layers.1.key_scale", *(f"layers.2.{kind}" for kind in ("key_channel_order", "key_mean", "key_scale"))]
    assert sorted(load_file(path)) == names
    found = read_calibration(path, model)
    assert found.layers[1].tensors().keys() == {"key_scale"}
    for part, expected in zip(found.of_layer(2, 2, 64, codes_only=False).parts, layers[2].parts, strict=True):
        assert part.dtype == expected.dtype
        assert torch.equal(part, expected)


def test_caches_that_store_all_tokens_as_codes_have_transforms_of_their_own(path, model):
    order = torch.arange(64).flip(0).repeat(2, 1)
    layers, codes_only = {1: KeyTransform(torch.ones(2, 64))}, {1: KeyTransform(torch.zeros(2, 64), order=order)}
    write_calibration(path, Calibration(layers, model, "a/model", 2000, codes_only))
    assert sorted(load_file(path)) == ["codes_only.1.key_channel_order", "codes_only.1.key_mean", "layers.1.key_mean"]
    found = read_calibration(path, model)
    assert torch.equal(found.of_layer(1, 2, 64, codes_only=True).order, order)
    assert found.of_layer(1, 2, 64, codes_only=False).order is None
    assert found.orders_every_layer(codes_only=True)
    assert not found.orders_every_layer(codes_only=False)
    with pytest.raises(ValueError, match=r"transforms for layers \[1\], and where all tokens are codes for \[2\]"):
        Calibration(layers, model, "a/model", 2000, {2: codes_only[1]})


def test_one_of_them_serves_all_caches_where_there_are_no_others(written, model):
    found = read_calibration(written, model)
    assert found.codes_only is None
    assert found.for_cache(codes_only=True) is found.layers


def test_the_tensors_have_names_that_others_can_read(written):
    assert set(load_file(written)) == {"layers.0.key_mean", "layers.3.key_mean"}


def test_a_file_is_replaced_whole_or_not_at_all(written, calibration, monkeypatch):
    write_calibration(written, replace(calibration, num_tokens=7))
    assert read_calibration(written).num_tokens == 7

    def fail(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_calibration(written, calibration)
    assert read_calibration(written).num_tokens == 7
    assert list(written.parent.iterdir()) == [written]


@pytest.mark.parametrize("num_bytes", [0, 5, 8, 100, -1])
def test_a_truncated_file(written, num_bytes):
    written.write_bytes(written.read_bytes()[:num_bytes])
    assert "is truncated" in refusal(written)


def test_bytes_after_the_last_tensor(written):
    written.write_bytes(written.read_bytes() + b"and more")
    refusal(written)


def test_a_pickle_is_not_loaded(path, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("executed").touch, ())

    path.write_bytes(pickle.dumps(Evil()))
    refusal(path)
    torch.save({"layers.0.key_mean": torch.zeros(2, 64)}, path)
    refusal(path)
    assert not tmp_path.joinpath("executed").exists()


def test_a_header_that_claims_to_be_huge(path):
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    refusal(path)


def test_weights_of_a_model_are_no_calibration(path):
    save_file({"model.layers.0.self_attn.k_proj.weight": torch.zeros(4, 4)}, path)
    assert "its format is None" in refusal(path)


@pytest.mark.parametrize("version", ["1", "3", None])
def test_another_version_of_the_format(written, version):
    rewrite(written, format_version=version)
    assert f"format version is {version}, and this version of turboquant-core reads 2" in refusal(written)


@pytest.mark.parametrize("field", ["model", "source", "num_tokens"])
def test_metadata_that_is_missing(written, field):
    rewrite(written, **{field: None})
    assert f"lacks '{field}'" in refusal(written)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_tokens", "many"),
        ("num_tokens", "0"),
        ("model", "{"),
        ("model", "[]"),
        ("model", "[" * 100_000),
        ("model", "{}"),
        ("model", '{"num_layers": 4}'),
    ],
)
def test_metadata_that_is_wrong(written, field, value):
    rewrite(written, **{field: value})
    refusal(written)


@pytest.mark.parametrize(("name", "value"), [("num_layers", "4"), ("num_layers", True), ("rope_theta", ["a"])])
def test_a_model_with_fields_of_another_type(written, model, name, value):
    rewrite(written, model=json.dumps({**json.loads(model.to_json()), name: value}))
    refusal(written)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"layers.0.value_mean": torch.zeros(2, 64)}, "layers.0.value_mean"),
        ({"layers.00.key_mean": torch.zeros(2, 64)}, "layers.00.key_mean"),
        ({"layers.4.key_mean": torch.zeros(2, 64)}, "layer 4 of a model of 4 layers"),
        ({"layers.0.key_mean": torch.zeros(2, 64, dtype=torch.float16)}, "torch.float16"),
        ({"layers.0.key_mean": torch.zeros(128)}, "[128]"),
        ({"layers.0.key_mean": torch.zeros(0, 64)}, "[0, 64]"),
        ({"layers.0.key_mean": torch.zeros(1, 65)}, "head_dim is 65"),
        ({"layers.0.key_mean": torch.zeros(1, 2, 64)}, "[1, 2, 64]"),
        ({"layers.0.key_matrix": torch.zeros(2, 64, 64)}, "layers.0.key_matrix"),
        ({"layers.0.key_scale": torch.zeros(2, 64)}, "key_scale holds 0.0; it must be 0.001 to 1000"),
        ({"layers.0.key_channel_order": torch.zeros(2, 64)}, "key_channel_order is torch.float32"),
        ({"layers.0.key_channel_order": torch.zeros(2, 64).long()}, "name every channel of a head once"),
        ({"layers.0.key_scale": torch.ones(1, 64), "layers.0.key_mean": torch.zeros(2, 64)}, "key_scale is [1, 64]"),
        ({"layers.0.key_mean": torch.full((1, 64), torch.nan)}, "must be finite"),
        ({"layers.0.key_mean": torch.full((1, 64), torch.inf)}, "must be finite"),
    ],
)
def test_tensors_that_are_no_transform(written, tensors, said):
    rewrite(written, tensors)
    assert said in refusal(written)


@pytest.mark.parametrize("place", ["missing.safetensors", "."])
def test_a_file_that_is_not_there(tmp_path, place):
    with pytest.raises(FileNotFoundError, match="turboquant calibrate"):
        read_calibration(tmp_path / place)


def test_a_file_of_another_model_says_in_what_it_differs(written):
    other = ModelIdentity.of(
        config(hidden_size=128, rope_parameters={"rope_type": "default", "rope_theta": 1e6}), "LlamaForCausalLM"
    )
    message = refusal(written, other)
    assert "a/model (Qwen2ForCausalLM)" in message
    assert "LlamaForCausalLM" in message
    assert "hidden_size 96 and 128; rope_theta 10000 and 1e+06" in message
    assert "vocab_size" not in message


def test_one_model_under_two_classes_is_one_model(written):
    read_calibration(written, ModelIdentity.of(config(), "Qwen2Model"))


@pytest.mark.parametrize(
    ("parameters", "theta", "factor"),
    [
        (None, (), ()),
        ({"rope_theta": 5.0, "rope_type": "default"}, (5.0,), (1.0,)),
        ({"rope_theta": 5, "rope_type": "yarn", "factor": 4}, (5.0,), (4.0,)),
        (
            {
                "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
                "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
                "linear_attention": None,
            },
            (1e6, 1e4),
            (8.0, 1.0),
        ),
    ],
)
def test_rotary_embeddings(parameters, theta, factor):
    model = ModelIdentity.of(config(rope_parameters=parameters), "A")
    assert (model.rope_theta, model.rope_factor) == (theta, factor)
    assert ModelIdentity.from_json(model.to_json()) == model


def test_a_file_without_everything_of_the_rotary_embedding_is_read(written):
    """Files written before say the base and the factor alone."""
    data = json.loads(ModelIdentity.of(config(), "Qwen2ForCausalLM").to_json())
    del data["rope"], data["rope_fields"]
    rewrite(written, model=json.dumps(data))
    halved = {"rope_type": "default", "rope_theta": 10000, "partial_rotary_factor": 0.5}
    read_calibration(written, ModelIdentity.of(config(rope_parameters=halved), "Qwen2ForCausalLM"))
    other = {"rope_type": "default", "rope_theta": 5}
    assert "rope_theta" in refusal(written, ModelIdentity.of(config(rope_parameters=other), "Qwen2ForCausalLM"))


@pytest.mark.parametrize(
    ("mine", "its"),
    [
        ({"rope_type": "default"}, {"type": "mrope", "partial_rotary_factor": 1.0, "attention_factor": None}),
        ({"rope_type": "su", "long_factor": [1, 2]}, {"rope_type": "longrope", "long_factor": [1.0, 2.0]}),
        ({"rope_type": "yarn", "factor": 2}, {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 99}),
    ],
)
def test_spellings_of_one_rotary_embedding(mine, its):
    one, two = (
        ModelIdentity.of(config(max_position_embeddings=99, rope_parameters={"rope_theta": 5, **each}), "A")
        for each in (mine, its)
    )
    assert one.differences(two) == []
    assert one == two
    assert ModelIdentity.from_json(one.to_json()) == one


def test_a_field_that_one_version_of_transformers_lacks_tells_nothing():
    one, two = config(no_rope_layers=[1, 1, 0, 1]), config(rope_interleave=True, no_rope_layers=[True, True, False, 1])
    assert ModelIdentity.of(one, "A").differences(ModelIdentity.of(two, "A")) == []


def test_a_configuration_without_a_field():
    with pytest.raises(ValueError, match="names no hidden_size"):
        ModelIdentity.of(config(hidden_size=None), "A")


def test_a_layer_is_asked_for_by_its_shape(calibration):
    assert torch.equal(calibration.of_layer(3, 1, 128, codes_only=False).mean, calibration.layers[3].mean)
    with pytest.raises(ValueError, match=r"none for layer 1\. .*turboquant calibrate"):
        calibration.of_layer(1, 2, 64, codes_only=True)
    with pytest.raises(ValueError, match=r"layer 3 of a/model: key_mean is .* \[1, 128\].*\[2, 64\]"):
        calibration.of_layer(3, 2, 64, codes_only=True)


def test_no_layers_are_no_calibration(model):
    with pytest.raises(ValueError, match="there is no layer"):
        Calibration(layers={}, model=model, source="a/model", num_tokens=1)
