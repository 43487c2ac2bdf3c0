import json
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from turboquant_core import KeyTransform
from turboquant_core.calibration import Calibration, write_calibration
from turboquant_core.commands import app
from turboquant_core.model_identity import ModelIdentity, architecture_of
from turboquant_hf.tools.doctor.attention import model_attention
from turboquant_hf.tools.doctor.capacity import cut_into_blocks
from turboquant_hf.tools.doctor.cards import GIB
from turboquant_hf.tools.plan.command import plan
from turboquant_hf.tools.plan.plan import plotted_lengths

MEASURED = Path(__file__).parents[5] / "benchmarks" / "results" / "engine.json"
LLAMA_8B_WEIGHTS_GIB = 8_030_261_248 * 2 / GIB


def run(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200"})


def said(outcome):
    return " ".join(outcome.output.split())


def tokens(*arguments):
    outcome = run(*arguments, "--json", "-")
    assert outcome.exit_code == 0, outcome.output
    return {row["cache"]: row["tokens"] for row in json.loads(outcome.output)["caches"]}


@pytest.fixture(scope="module")
def measured():
    """KV tokens that vLLM reported on an H200 with Llama-3.1-8B's shape."""
    if not MEASURED.is_file():
        pytest.skip("benchmarks/results is not in the source distribution")
    caches = json.loads(MEASURED.read_text())["caches"]
    return {cache: caches[cache]["kv_tokens"] for cache in ("bf16", "fp8", "tq4")}


@pytest.fixture
def blocks(model_config):
    def cut(name, cache, tensor_parallel=1):
        config = model_config(name)
        return cut_into_blocks(config, model_attention(config), cache, tensor_parallel)

    return cut


def test_core_finds_the_command():
    (entry_point,) = entry_points(group="turboquant.commands", name="plan")
    assert entry_point.load() is plan


def test_vllms_token_counts_in_the_memory_that_it_had(model, measured):
    memory_gib = measured["bf16"] * 131_072 / GIB
    found = tokens(model("llama"), "--kv-memory", memory_gib)
    assert found["bf16"] == pytest.approx(measured["bf16"], abs=16)
    for cache, expected in measured.items():
        assert found[cache] == pytest.approx(expected, rel=0.01)
        assert found[cache] / found["bf16"] == pytest.approx(expected / measured["bf16"], rel=0.01)


def test_vllms_token_counts_on_the_card(model, measured):
    found = tokens(model("llama"), "--gpu", "H200", "--weights", LLAMA_8B_WEIGHTS_GIB, "--gpu-memory-utilization", 0.88)
    for cache, expected in measured.items():
        assert found[cache] == pytest.approx(expected, rel=0.01)


def test_whole_blocks_are_counted(model):
    folder = model("llama")
    block = 16 * 33_792
    memory = ["--length", 16, "--kv-memory"]
    assert tokens(folder, *memory, (3 * block + 100) / GIB)["tq4"] == 3 * 16
    assert tokens(folder, *memory, (3 * block - 100) / GIB)["tq4"] == 2 * 16


def test_requests_take_whole_blocks(model):
    rows = json.loads(run(model("llama"), "--kv-memory", 1, "--length", 1000, "--json", "-").output)["caches"]
    tq4 = next(row for row in rows if row["cache"] == "tq4")
    assert tq4["num_blocks"] == GIB // (16 * 33_792)
    assert tq4["requests"] == pytest.approx(tq4["num_blocks"] / 63)


def calibration(path, config, orders):
    """A file that orders the channels of some layers of a model."""
    scale = torch.ones(config.num_key_value_heads, config.head_dim)
    order = torch.arange(config.head_dim).flip(0).expand(scale.shape)
    layers = {index: KeyTransform(None, scale, order if has else None) for index, has in enumerate(orders)}
    identity = ModelIdentity.of(config, architecture_of(config))
    write_calibration(path, Calibration(layers, identity, "a/model", num_tokens=9))
    return path


def test_keys_that_a_calibration_file_splits_take_two_bytes_more(model, model_config, tmp_path):
    folder, config = model("llama"), model_config("llama")
    path, num_layers = tmp_path / "keys.safetensors", config.num_hidden_layers

    def block_bytes(*arguments):
        planned = json.loads(run(folder, "--kv-memory", 10, "--json", "-", *arguments).output)
        return {row["cache"]: row["block_bytes"] for row in planned["caches"]}

    plain = block_bytes()
    more = 16 * 2 * num_layers * config.num_key_value_heads
    split = block_bytes("--calibration", calibration(path, config, [True] * num_layers))
    assert {cache for cache in plain if split[cache] != plain[cache]} == {"tq4", "tq3", "tq2"}
    assert all(split[cache] - plain[cache] in (0, more) for cache in plain)
    # vLLM's pages are of one size.
    assert block_bytes("--calibration", calibration(path, config, [True] * (num_layers - 1) + [False])) == plain


def test_a_calibration_file_of_another_model_is_refused(model, model_config, tmp_path):
    path = calibration(tmp_path / "keys.safetensors", model_config("gpt-oss"), [True])
    for given, reason in ((path, "keys.safetensors holds the calibration of a/model"), ("none", "no file")):
        outcome = run(model("llama"), "--kv-memory", 10, "--calibration", given)
        assert outcome.exit_code == 2
        assert reason in said(outcome)


def test_layers_with_a_window_take_no_more_than_it(blocks):
    # Twelve layers, of which ten have a window: six groups of two.
    cut = blocks("gemma3", "tq4")
    assert cut.nbytes == 2 * 16 * 4 * 260
    assert [pages.window for pages in cut.groups].count(1024) == 5
    assert len(cut.groups) == 6
    # 131,072 / 16 blocks without a window, and (1023 + 2 * 8192) / 16 and one more in each group that has one.
    assert cut.capacity(cut.nbytes * 100_000, 131_072).requests == pytest.approx(100_000 / (8192 + 5 * (1088 + 1)))
    assert blocks("gpt-oss", "tq4").groups[0].blocks_of(64, 8192) == 64 // 16 + 1


@pytest.mark.parametrize(
    ("name", "cache", "length", "num_blocks", "tokens"),
    [
        ("llama", "bf16", 8192, 10_240, 163_840),
        ("llama", "tq4", 8192, 39_718, 635_488),
        ("gemma3", "bf16", 131_072, 163_840, 1_574_747),
        ("gemma3", "tq4", 131_072, 645_277, 6_202_078),
        ("gpt-oss", "bf16", 4096, 327_680, 2_616_329),
        ("gpt-oss", "k6v4", 4096, 998_643, 7_973_570),
    ],
)
def test_what_vllm_counts_for_20_gib(blocks, name, cache, length, num_blocks, tokens):
    # get_kv_cache_groups and get_kv_cache_capacity of vLLM 0.32.0, given specs of these layers.
    found = blocks(name, cache).capacity(20 * GIB, length)
    assert (found.num_blocks, found.tokens) == (num_blocks, tokens)


@pytest.mark.parametrize("cache", ["bf16", "tq4"])
def test_heads_of_two_sizes_take_equal_pages(blocks, cache):
    # Nine layers with a window and three without, of which no layer that reads another's cache is one.
    cut = blocks("gemma4", cache)
    assert [(pages.tokens, pages.window) for pages in cut.groups] == [(32, 1024)] * 3 + [(16, None)]
    assert cut.nbytes == 3 * 32 * 2 * (260 if cache == "tq4" else 1024)


def test_states_of_linear_attention_fill_a_page(blocks):
    cut = blocks("qwen3next", "bf16")
    # 32 heads of 128 x 128 and a convolution of 8,192 channels over 3 tokens, in bf16.
    state = 2 * (32 * 128 * 128 + 8192 * 3)
    page = cut.nbytes // 2
    assert state <= page < state + 16 * 2048
    assert [pages.tokens for pages in cut.groups].count(None) == 3
    assert blocks("qwen3next", "tq4").groups[0].tokens > 3.8 * cut.groups[0].tokens


def test_cards_share_heads(model, blocks):
    one, four, sixteen = (blocks("llama", "tq4", cards).nbytes for cards in (1, 4, 16))
    # Eight KV heads on sixteen cards: one each, every one twice.
    assert (one / four, one / sixteen) == (4, 8)
    folder = model("llama")
    outcome = run(folder, "--kv-memory", 10, "--tensor-parallel", 3)
    assert outcome.exit_code == 2
    assert "tensor_parallel is 3" in said(outcome)
    alone = tokens(folder, "--memory", 80, "--weights", 20)["tq4"]
    shared = tokens(folder, "--memory", 80, "--weights", 20, "--tensor-parallel", 2)["tq4"]
    assert shared > 2 * alone


def test_weights_come_from_the_files(model, key_biases):
    folder = model("qwen2", key_biases(1, 1, 1))
    assert tokens(folder, "--memory", 8) == tokens(folder, "--memory", 8, "--weights", 3 * 512 / GIB)


def test_weights_that_are_not_known_are_asked_for(model):
    outcome = run(model("llama"), "--gpu", "H200")
    assert outcome.exit_code == 2
    assert "--weights" in said(outcome)


def test_weights_that_leave_no_room(model):
    outcome = run(model("llama"), "--gpu", "L4", "--weights", 30)
    assert outcome.exit_code == 1
    assert "nothing is left for a cache" in said(outcome)


@pytest.mark.parametrize(("name", "reason"), [("deepseek", "latent"), ("bert", "encoder")])
def test_models_that_are_not_served_are_refused(model, name, reason):
    outcome = run(model(name), "--kv-memory", 10)
    assert outcome.exit_code == 1
    assert reason in said(outcome)


def test_a_gguf_file_is_planned_as_its_model_in_safetensors_files(gguf_file):
    outcome = run(gguf_file, "--memory", 10, "--weights", 0, "--json", "-")
    assert outcome.exit_code == 0, outcome.output
    assert "GGUF files need a plugin of vLLM's" in " ".join(outcome.stderr.split())
    plain = json.loads(outcome.stdout)
    # Its one tensor of 128 numbers.
    weighed = json.loads(run(gguf_file, "--memory", 10, "--json", "-").stdout)
    assert plain["kv_bytes_per_card"] - weighed["kv_bytes_per_card"] == 256
    row = next(row for row in plain["caches"] if row["cache"] == "tq4")
    assert row["block_bytes"] == 16 * 132


def test_without_a_model_it_is_the_default_one(monkeypatch, model):
    monkeypatch.setattr("turboquant_hf.tools.doctor.inputs.default_model", lambda: str(model("llama")))
    outcome = run("--kv-memory", 10)
    assert outcome.exit_code == 0, outcome.output
    assert "llama: 10.00 GiB for the KV cache" in said(outcome)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "give one of --gpu NAME, --memory GiB and --kv-memory GiB"),
        (["--gpu", "H200", "--memory", "80"], "give one of --gpu"),
        (["--gpu", "A9000"], "GPU 'A9000' is not known; known are B200"),
        (["--kv-memory", "10", "--preset", "tq5"], "preset is 'tq5'; it must be one of tq4"),
        (["--kv-memory", "10", "--preset", "tq3.5"], "tq3.5 has fractional bits"),
        (["--kv-memory", "10", "--length", "200000"], "the context of"),
        (["--memory", "nan"], "nan is no number from 0 to 1,048,576."),
        (["--memory", "x"], "x is no number from 0 to 1,048,576."),
        (["--memory", "80", "--gpu-memory-utilization", "1.5"], "1.5 is no number from 0 to 1."),
        (["--kv-memory", "10", "--json", "none/plan.json"], "there is no folder none"),
    ],
)
def test_bad_arguments(model, arguments, reason):
    outcome = run(model("llama"), *arguments)
    assert outcome.exit_code == 2
    assert reason in said(outcome)


def test_presets_are_chosen(model):
    assert list(tokens(model("llama"), "--kv-memory", 10, "--preset", "k8v4")) == ["bf16", "fp8", "k8v4"]


def test_the_table(model):
    outcome = run(model("llama"), "--kv-memory", 10, "--length", 4096)
    assert outcome.exit_code == 0
    assert "requests of 4,096 tokens at once" in said(outcome)
    assert "3.88x" in said(outcome)


def test_a_plot(model, tmp_path):
    path = tmp_path / "plan.svg"
    outcome = run(model("llama"), "--kv-memory", 10, "--plot", path)
    if find_spec("matplotlib") is None:
        assert outcome.exit_code == 2
        assert "uv pip install matplotlib" in said(outcome)
        return
    assert outcome.exit_code == 0
    assert "<svg" in path.read_text()
    assert run(tmp_path / "llama", "--kv-memory", 10, "--plot", tmp_path / "plan.png").exit_code == 2


def test_a_context_below_the_default_length_is_named(model):
    folder = model("llama")
    assert "whole context" not in said(run(folder, "--kv-memory", 10))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}))
    outcome = said(run(folder, "--kv-memory", 10))
    assert "requests are of the model's whole context, 4,096 tokens, and not of 8,192" in outcome
    assert "whole context" not in said(run(folder, "--kv-memory", 10, "--length", 4096))


def test_plotted_lengths_stay_within_the_context():
    assert plotted_lengths(8192) == [1024, 2048, 4096, 8192]
    assert plotted_lengths(512) == [512]
