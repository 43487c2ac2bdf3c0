"""Small model folders for doctor and plan, made by hand, and a finished run file of eval."""

import json

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from transformers import (
    BertConfig,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GptOssConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3NextConfig,
)
from typer.testing import CliRunner

from turboquant_core.commands import app
from turboquant_hf.tools.inputs import load

SMALL_EVAL = (
    *("--cache", "tq4", "--cache", "k8v4", "--tokens", "384", "--needle-length", "128", "--needle-depths", "2"),
    *("--greedy-tokens", "6", "--device", "cpu"),
)

CONFIGS = {
    "llama": LlamaConfig(
        num_hidden_layers=32,
        hidden_size=4096,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
    ),
    "qwen2": Qwen2Config(num_hidden_layers=3, hidden_size=512, num_attention_heads=4, num_key_value_heads=2),
    "gemma3": Gemma3TextConfig(
        num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=4, head_dim=256, sliding_window=1024
    ),
    "gemma3n": Gemma3nTextConfig(num_hidden_layers=10, num_kv_shared_layers=4),
    "gemma4": Gemma4TextConfig(
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=256,
        global_head_dim=512,
        sliding_window=1024,
        num_kv_shared_layers=4,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 4,
    ),
    "qwen3next": Qwen3NextConfig(num_hidden_layers=8),
    "gpt-oss": GptOssConfig(num_hidden_layers=4),
    "deepseek": DeepseekV3Config(num_hidden_layers=2),
    "bert": BertConfig(num_hidden_layers=2),
}


@pytest.fixture
def model_config():
    """A configuration by name."""
    return CONFIGS.__getitem__


@pytest.fixture
def model(tmp_path):
    """Writes a folder with the configuration of that name, fields of it replaced, and tensors where given."""

    def write(name, tensors=None, **fields):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIGS[name].to_dict() | fields), encoding="utf-8")
        if tensors is not None:
            save_file(tensors, folder / "model.safetensors")
        return folder

    return write


@pytest.fixture
def key_biases():
    """Makes constant key biases, one a layer."""

    def make(*values, size=256):
        return {
            f"model.layers.{layer}.self_attn.k_proj.bias": torch.full((size,), float(value), dtype=torch.bfloat16)
            for layer, value in enumerate(values)
        }

    return make


@pytest.fixture
def gguf_file(tmp_path):
    """A GGUF file of one layer with a large key bias."""
    path = tmp_path / "tiny.gguf"
    writer = GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(256)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_tensor("blk.0.attn_k.bias", torch.full((128,), 90.0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """On tensors as small as these a second thread does nothing but wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_eval():
    """Runs the command, by default small."""

    def run(*arguments, small=True):
        options = [str(argument) for argument in ((*SMALL_EVAL, *arguments) if small else arguments)]
        return CliRunner().invoke(app, ["eval", *options], env={"COLUMNS": "160"})

    return run


@pytest.fixture(scope="session")
def run_tune():
    """Runs the command on few tokens."""

    def run(*arguments):
        options = [*map(str, arguments), "--device", "cpu", "--tokens", "512", "--held-out-tokens", "512"]
        return CliRunner().invoke(app, ["tune", *options], env={"COLUMNS": "160"})

    return run


@pytest.fixture
def meanwhile(monkeypatch):
    """Has something happen while a command loads its model."""

    def at_load(happens):
        def loads(*args):
            happens()
            return load(*args)

        monkeypatch.setattr("turboquant_hf.tools.inputs.load", loads)

    return at_load


@pytest.fixture(scope="session")
def finished(run_eval, tiny_model_folder, tmp_path_factory):
    """A finished run file, and what the command said."""
    path = tmp_path_factory.mktemp("eval") / "run.json"
    outcome = run_eval(tiny_model_folder, "--out", path)
    assert outcome.exit_code == 0, outcome.output
    return path, outcome.output


@pytest.fixture
def continued(finished, tmp_path):
    """A run file of the same settings that lacks the results whose names do not satisfy a condition."""

    def make(is_there):
        data = json.loads(finished[0].read_text())
        data["results"] = {name: result for name, result in data["results"].items() if is_there(name)}
        path = tmp_path / "run.json"
        path.write_text(json.dumps(data))
        return path

    return make


@pytest.fixture(scope="session")
def said():
    return lambda outcome: " ".join(outcome.output.split())
