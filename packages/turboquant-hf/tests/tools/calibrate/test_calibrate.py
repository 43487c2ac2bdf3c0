import json
from importlib.metadata import entry_points

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from turboquant_core.calibration import read_calibration
from turboquant_core.commands import app
from turboquant_core.model_identity import ModelIdentity
from turboquant_hf.tools.calibrate.command import calibrate


def run(*arguments):
    return CliRunner().invoke(app, ["calibrate", *map(str, arguments)], env={"COLUMNS": "160"})


def said(outcome):
    return " ".join(outcome.output.split())


def test_core_finds_the_command():
    (entry_point,) = entry_points(group="turboquant.commands", name="calibrate")
    assert entry_point.load() is calibrate


def test_a_file_that_belongs_to_the_model(tiny_model, tiny_model_folder, tmp_path):
    path = tmp_path / "turboquant.safetensors"
    outcome = run(tiny_model_folder, "--out", path, "--tokens", 600, "--device", "cpu")
    assert outcome.exit_code == 0, outcome.output
    assert "calibration of 2 layers" in said(outcome)
    assert "over 480 tokens" in said(outcome)
    calibration = read_calibration(path, ModelIdentity.of(tiny_model.config, "LlamaForCausalLM"))
    assert (calibration.num_tokens, calibration.source) == (480, str(tiny_model_folder))
    assert {index: tuple(transform.mean.shape) for index, transform in calibration.layers.items()} == {
        0: (2, 64),
        1: (2, 64),
    }
    assert list(tmp_path.iterdir()) == [path]


def test_only_its_own_file_is_replaced(tiny_model_folder, tmp_path):
    path, options = tmp_path / "turboquant.safetensors", ("--tokens", 300, "--device", "cpu")
    for _ in range(2):
        assert run(tiny_model_folder, "--out", path, *options).exit_code == 0
    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, weights)
    before = weights.read_bytes()
    outcome = run(tiny_model_folder, "--out", weights, *options)
    assert outcome.exit_code == 2
    assert "this command did not write it" in " ".join(outcome.output.split())
    assert weights.read_bytes() == before
    assert run(tiny_model_folder, "--out", weights, *options, "--force").exit_code == 0
    assert read_calibration(weights).num_tokens == 240


def test_json_alone(tiny_model_folder, tmp_path):
    path = tmp_path / "turboquant.safetensors"
    outcome = run(tiny_model_folder, "--out", path, "--tokens", 300, "--json", "-", "--device", "cpu")
    found = json.loads(outcome.stdout)
    layers = found.pop("layers")
    assert found == {
        "format": "turboquant calibrate --json",
        "file": str(path),
        "model": str(tiny_model_folder),
        "num_tokens": 240,
        "num_held_out": 60,
    }
    assert layers.keys() == {"0", "1"}
    for layer in layers.values():
        assert layer.keys() == {"shape", "kind", "errors", "left"}
        assert layer["shape"] == [2, 64]
        assert layer["errors"][layer["kind"]] == min(layer["errors"].values())


def test_a_text_of_ones_own(tiny_model_folder, tmp_path):
    text, path = tmp_path / "text.txt", tmp_path / "means.safetensors"
    text.write_text("Shakespeare was born " * 100, encoding="utf-8")
    outcome = run(tiny_model_folder, "--out", path, "--text", text, "--device", "cpu")
    assert outcome.exit_code == 0, outcome.output
    assert read_calibration(path).num_tokens == 240


def test_a_text_is_cut_to_the_models_context(tiny_config, tiny_model_folder, tmp_path):
    folder, path = tmp_path / "model", tmp_path / "means.safetensors"
    LlamaForCausalLM(tiny_config(max_position_embeddings=400)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_model_folder / name).read_bytes())
    assert run(folder, "--out", path, "--device", "cpu").exit_code == 0
    assert read_calibration(path).num_tokens == 320


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"too short", "2 tokens that"),
        (b"\xff\xfe\xfd", "cannot read"),
        (None, "cannot read"),
    ],
)
def test_a_text_that_does_not_do(tiny_model_folder, tmp_path, content, reason):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    outcome = run(tiny_model_folder, "--out", tmp_path / "means.safetensors", "--text", text, "--device", "cpu")
    assert outcome.exit_code == 2
    assert reason in said(outcome)
    assert "--text" in said(outcome)
    assert not (tmp_path / "means.safetensors").exists()


def test_too_few_tokens_are_refused(tmp_path):
    outcome = run("a/model", "--out", tmp_path / "means.safetensors", "--tokens", 10)
    assert outcome.exit_code == 2
    assert "256" in said(outcome)


def test_a_folder_that_is_not_there(tmp_path):
    outcome = run("a/model", "--out", tmp_path / "none" / "means.safetensors")
    assert outcome.exit_code == 2
    assert "there is no folder" in said(outcome)


def test_a_folder_in_place_of_the_file(tmp_path):
    outcome = run("a/model", "--out", tmp_path)
    assert outcome.exit_code == 2
    assert "is a folder; name a file" in said(outcome)


def test_a_model_that_is_not_there(tmp_path):
    outcome = run("missing.gguf", "--out", tmp_path / "means.safetensors", "--device", "cpu")
    assert outcome.exit_code == 2
    assert "cannot load missing.gguf" in said(outcome)
