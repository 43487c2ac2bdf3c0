"""Damaged files, as many as there is time for: what is read is what was written, or the file is refused by name."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from turboquant_core.calibration import Calibration, read_calibration, write_calibration
from turboquant_core.key_transform import KeyTransform
from turboquant_core.layer_bits import LayerBits, read_layer_bits, write_layer_bits
from turboquant_core.model_identity import ModelIdentity
from turboquant_core.testing.damage import damaged_bytes, damaged_json, header_of, read_or_refused, with_header

MODEL = ModelIdentity("Qwen2ForCausalLM", "qwen2", 4, 96, 6, 1000, (10000.0,), (1.0,))
BITS = LayerBits({0: (8, 4), 3: (3.5, 2)}, MODEL, "a/model", {"tuned_kl": 0.25, "all": [1, 2]})
MEANS = Calibration({0: KeyTransform(torch.ones(2, 64)), 3: KeyTransform(torch.ones(1, 128))}, MODEL, "a/model", 2000)

randoms = st.randoms(use_true_random=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("damaged")


@pytest.fixture(scope="module")
def bits_file(folder):
    write_layer_bits(folder / "bits.json", BITS)
    return (folder / "bits.json").read_bytes()


@pytest.fixture(scope="module")
def means_file(folder):
    write_calibration(folder / "means.safetensors", MEANS)
    return (folder / "means.safetensors").read_bytes()


AGAIN = "Write it again with `turboquant"


@given(randoms)
@settings(max_examples=100, deadline=None)
def test_bits_of_layers(folder, bits_file, random):
    read_or_refused(read_layer_bits, folder / "damaged.json", damaged_bytes(bits_file, random), AGAIN)


@given(randoms)
@settings(max_examples=100, deadline=None)
def test_bits_of_layers_with_other_values(folder, bits_file, random):
    text = damaged_json(json.loads(bits_file), random)
    read = read_or_refused(read_layer_bits, folder / "damaged.json", text.encode(), AGAIN)
    if read is not None:
        # What is read can be written, and is the same again.
        write_layer_bits(folder / "again.json", read)
        assert read_layer_bits(folder / "again.json") == read


@given(randoms)
@settings(max_examples=100, deadline=None)
def test_key_means(folder, means_file, random):
    read_or_refused(read_calibration, folder / "damaged.safetensors", damaged_bytes(means_file, random), AGAIN)


@given(randoms)
@settings(max_examples=100, deadline=None)
def test_key_means_with_another_header(folder, means_file, random):
    damaged = with_header(means_file, damaged_json(header_of(means_file), random))
    read_or_refused(read_calibration, folder / "damaged.safetensors", damaged, AGAIN)


@given(randoms)
@settings(max_examples=100, deadline=None)
def test_key_means_of_another_model(folder, means_file, random):
    header = header_of(means_file)
    metadata = header["__metadata__"]
    metadata["model"] = damaged_json(json.loads(metadata["model"]), random)
    content = with_header(means_file, json.dumps(header))
    read = read_or_refused(read_calibration, folder / "damaged.safetensors", content, AGAIN)
    if read is not None:
        write_calibration(folder / "again.safetensors", read)
        assert read_calibration(folder / "again.safetensors").model == read.model
