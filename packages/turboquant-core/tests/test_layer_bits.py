import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from turboquant_core.layer_bits import LayerBits, read_layer_bits, write_layer_bits
from turboquant_core.model_identity import ModelIdentity

REMEDY = "turboquant tune MODEL --target-bits BITS --out FILE"


def identity(**changes):
    fields = {
        "model_type": "qwen2",
        "num_hidden_layers": 4,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "vocab_size": 1000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
    }
    return ModelIdentity.of(SimpleNamespace(**{**fields, **changes}), "Qwen2ForCausalLM")


@pytest.fixture
def bits():
    return LayerBits({0: (8, 4), 3: (3.5, 2)}, identity(), "a/model", {"tuned_kl": 0.25})


@pytest.fixture
def written(bits, tmp_path):
    path = tmp_path / "turboquant.json"
    write_layer_bits(path, bits)
    return path


def refusal(path, model=None):
    with pytest.raises(ValueError, match=r"turboquant\.json") as error:
        read_layer_bits(path, model)
    assert REMEDY in str(error.value)
    return str(error.value)


def rewrite(path, **changes):
    """Write the file again with changed keys; None removes one."""
    data = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}))


def test_what_is_written_is_read(written, bits):
    assert read_layer_bits(written, identity()) == bits


def test_the_file_says_what_it_is_in_plain_json(written):
    data = json.loads(written.read_text())
    assert (data["format"], data["format_version"]) == ("turboquant-layer-bits", 1)
    assert data["layer_bits"] == {"0": [8, 4], "3": [3.5, 2]}
    assert data["model"]["num_layers"] == 4


def test_a_file_is_replaced_whole_or_not_at_all(written, bits, monkeypatch):
    def fail(*arguments):
        raise OSError("the disk is full")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_layer_bits(written, replace(bits, source="another"))
    assert read_layer_bits(written) == bits
    assert list(written.parent.iterdir()) == [written]


def test_a_layer_is_asked_for(bits):
    assert bits.of_layer(3) == (3.5, 2)
    with pytest.raises(ValueError, match=r"none for layer 1\. .*turboquant tune"):
        bits.of_layer(1)


@pytest.mark.parametrize("num_bytes", [0, 1, 100, -4])
def test_a_truncated_file(written, num_bytes):
    written.write_bytes(written.read_bytes()[:num_bytes])
    assert "is truncated" in refusal(written)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 100_000])
def test_a_file_that_is_no_json(written, content):
    written.write_bytes(content)
    refusal(written)


@pytest.mark.parametrize("content", ["[]", "{}", '"text"', "null"])
def test_json_of_something_else(written, content):
    written.write_text(content)
    assert "not 'turboquant-layer-bits'" in refusal(written)


def test_a_later_format(written):
    rewrite(written, format_version=2, more=1)
    assert "format version is 2, and this version of turboquant-core reads 1" in refusal(written)


@pytest.mark.parametrize(("changes", "named"), [({"more": 1}, "more"), ({"model": None}, "model")])
def test_keys_that_are_missing_or_unknown(written, changes, named):
    rewrite(written, **changes)
    assert refusal(written).partition("too many: ")[2].startswith(named)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_bits": []}, "layer_bits is []"),
        ({"layer_bits": {}}, "no layer with bits"),
        ({"layer_bits": {"4": [4, 4]}}, "layer 4 of a model of 4 layers"),
        ({"layer_bits": {"-1": [4, 4]}}, "layer '-1'"),
        ({"layer_bits": {"01": [4, 4]}}, "layer '01'"),
        ({"layer_bits": {"0": 4}}, "the bits of layer 0 are 4"),
        ({"layer_bits": {"0": [4]}}, "the bits of layer 0 are [4]"),
        ({"layer_bits": {"0": ["4", 4]}}, "the bits of layer 0"),
        ({"layer_bits": {"0": [True, 4]}}, "the bits of layer 0"),
        ({"layer_bits": {"0": [7, 4]}}, "key_bits of layer 0 is 7; it must be one of 2, 2.5"),
        ({"layer_bits": {"0": [4, 16]}}, "value_bits of layer 0 is 16; it must be one of 2, 2.5"),
        ({"source": 3}, "source is 3"),
        ({"measured": 3}, "measured is 3"),
        ({"model": {}}, "the fields of the model"),
        ({"model": "qwen2"}, "the fields of the model"),
    ],
)
def test_contents_that_are_wrong(written, changes, said):
    rewrite(written, **changes)
    assert said in refusal(written)


@pytest.mark.parametrize("place", ["missing.json", "."])
def test_a_file_that_is_not_there(tmp_path, place):
    with pytest.raises(FileNotFoundError, match="turboquant tune"):
        read_layer_bits(tmp_path / place)


def test_a_file_of_another_model_says_in_what_it_differs(written):
    assert "hidden_size 96 and 128" in refusal(written, identity(hidden_size=128))
