import json
import re
from importlib.metadata import entry_points

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PersimmonConfig,
)
from typer.testing import CliRunner

from turboquant_core import PRESETS, KVCacheLayout, TurboQuantConfig
from turboquant_core.calibration import Calibration, write_calibration
from turboquant_core.commands import app
from turboquant_core.key_transform import KeyTransform
from turboquant_core.model_identity import ModelIdentity
from turboquant_hf._compat import CACHE_ARGUMENT, gguf_weights_in_full
from turboquant_hf.tools import models
from turboquant_hf.tools.doctor import checkpoint as checkpoints
from turboquant_hf.tools.doctor.attention import model_attention
from turboquant_hf.tools.doctor.cards import CARDS, find_card
from turboquant_hf.tools.doctor.checkpoint import open_checkpoint
from turboquant_hf.tools.doctor.command import doctor
from turboquant_hf.tools.doctor.engines import by_transformers, by_vllm
from turboquant_hf.tools.doctor.key_bias import key_biases as read_key_biases
from turboquant_hf.tools.models import load_model

SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 16}
MEANS_ALONE = KeyTransform(torch.zeros(4, 64))


def run(*arguments):
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)], env={"COLUMNS": "200"})


def said(outcome):
    return " ".join(outcome.output.split())


def found(folder, *arguments):
    outcome = run(folder, "--json", "-", *arguments)
    return outcome.exit_code, json.loads(outcome.output)


def test_core_finds_the_command():
    (entry_point,) = entry_points(group="turboquant.commands", name="doctor")
    assert entry_point.load() is doctor


@pytest.mark.parametrize(
    ("name", "kinds", "vllm", "transformers"),
    [
        ("llama", {"full attention": 32}, True, True),
        ("qwen2", {"full attention": 3}, True, True),
        ("gemma3", {"sliding window": 10, "full attention": 2}, True, True),
        ("gemma3n", {"sliding window": 5, "full attention": 1, "shared KV": 4}, True, True),
        ("qwen3next", {"linear attention": 6, "full attention": 2}, True, True),
        ("gpt-oss", {"sliding window": 2, "full attention": 2}, True, True),
        ("deepseek", {"MLA": 2}, False, True),
    ],
)
def test_kinds_of_layers_and_who_serves_them(model, name, kinds, vllm, transformers):
    status, data = found(model(name))
    layers = [layer["kind"] for layer in data["layers"]]
    assert {kind: layers.count(kind) for kind in layers} == kinds
    served = {engine: verdict["served"] for engine, verdict in data["engines"].items()}
    assert served == {"vllm": vllm, "transformers": transformers}
    assert status == (0 if vllm or transformers else 1)
    assert (data["engines"]["vllm"]["command"] is not None) == vllm


@pytest.mark.parametrize(("gpu", "served"), [("A100-80GB", False), ("H200", True), ("B200", False)])
def test_heads_of_512_need_hopper_in_vllm(model, gpu, served):
    vllm = found(model("gemma4"), "--gpu", gpu)[1]["engines"]["vllm"]
    assert vllm["served"] == served
    assert served or "head_dim is 512, and FlashAttention, which prefills, has it on sm_90 alone" in vllm["refusals"][0]
    assert found(model("gemma3n"), "--gpu", gpu)[1]["engines"]["vllm"]["served"]


def test_what_is_special_about_a_model_is_said(model):
    assert found(model("gpt-oss"))[1]["sinks"]
    assert found(model("gemma3", attn_logit_softcapping=50.0))[1]["softcap"] == 50
    data = found(model("deepseek"))[1]
    assert data["kv_lora_rank"] == 512
    assert data["bytes_per_token"]["growing"]["bf16"] == 2 * 2 * (512 + 64)
    assert data["bytes_per_token"]["growing"]["tq4"] == 2 * (512 // 2 + 2 + 64 // 2 + 2)
    assert "latent attention" in data["engines"]["vllm"]["refusals"][0]
    reasons = {(path["path"], path["reason"]) for path in data["engines"]["transformers"]["layers"]}
    assert reasons == {("dequantised", "keys of 512 channels and values of 64, and the kernels take one size")}


def test_no_file_is_recommended_where_none_can_be_made(model):
    data = found(model("deepseek"))[1]
    assert data["recommended"]["preset"] == "tq4"
    assert "head_dim is 512" in data["recommended"]["reason"]
    code = data["engines"]["transformers"]["command"]
    assert "calibrate" not in code
    assert 'TurboQuantCache(model.config, "tq4")' in code
    assert "calibration file" not in " ".join(run(model("deepseek")).output.split())
    assert "turboquant calibrate" in found(model("llama"))[1]["engines"]["transformers"]["command"]


def test_linear_layers_stay_the_engines_own(model):
    for verdict in found(model("qwen3next"))[1]["engines"].values():
        assert [path["path"] for path in verdict["layers"]] == [*["uncompressed"] * 3, "fused"] * 2


def test_bytes_are_those_of_the_layout(model):
    growing = found(model("gemma3"))[1]["bytes_per_token"]["growing"]
    for preset in PRESETS:
        layout = KVCacheLayout(TurboQuantConfig.preset(preset, 256), num_kv_heads=4, block_size=16)
        assert growing[preset] == 2 * layout.page_bytes / 16
    assert (growing["bf16"], growing["fp8"]) == (2 * 4096, 2 * 2048)


def test_a_preset_that_does_not_store_a_head_dim_has_no_size(model):
    growing = found(model("llama", hidden_size=1280, head_dim=40))[1]["bytes_per_token"]["growing"]
    assert growing["tq3.5"] is None
    assert growing["tq4"] == 32 * 8 * 44


def test_a_head_dim_that_vllm_refuses_and_transformers_serves(model):
    status, data = found(model("llama", head_dim=112))
    assert status == 0
    assert "head_dim is 112" in data["engines"]["vllm"]["refusals"][0]
    assert data["engines"]["transformers"]["layers"][0]["reason"].startswith("fp16 kernel; not fragment: head_dim")


def test_the_card_decides_on_the_kernel(model):
    data = found(model("llama"), "--gpu", "t4")[1]
    assert not data["engines"]["vllm"]["served"]
    assert "sm_75" in data["engines"]["vllm"]["refusals"][0]
    assert data["engines"]["transformers"]["layers"][0]["reason"].startswith("fp16 kernel")


def test_fractional_bits_and_old_models_are_dequantised(model):
    checkpoint = open_checkpoint(str(model("llama")))
    attention = model_attention(checkpoint.config)
    assert {path.path for path in by_transformers(checkpoint.config, attention, "tq3.5", (9, 0)).layers} == {
        "dequantised"
    }
    assert "fractional bits" in by_vllm(checkpoint, attention, "tq3.5", (9, 0)).refusals[0]


def test_biases_of_a_vision_tower_are_not_the_text_model_s(model, key_biases):
    tower = {"vision_tower.encoder.layers.0.self_attn.k_proj.bias": torch.full((96,), 300.0)}
    status, data = found(model("qwen2", key_biases(0.1) | tower))
    assert status == 0
    assert [layer["alarm"] for layer in data["key_bias"]["layers"]] == [False]


def test_large_key_biases_raise_the_alarm(model, key_biases):
    folder = model("qwen2", key_biases(80, 0.5, 0.5))
    status, data = found(folder)
    assert status == 0
    assert [layer["alarm"] for layer in data["key_bias"]["layers"]] == [True, False, False]
    # The bias times the root of the distortion of 4 bits at head_dim 128.
    assert data["key_bias"]["layers"][0]["logit_error"] == pytest.approx(80 * 0.009315**0.5, rel=1e-3)
    assert "ALARM" in said(run(folder))
    assert "leave center_keys on" in said(run(folder))


def test_small_biases_or_none_do_not(model, key_biases):
    for tensors, are_read in ((None, False), ({"model.norm.weight": torch.ones(4)}, True), (key_biases(1, 1, 1), True)):
        data = found(model("qwen2", tensors))[1]
        assert not data["key_bias"]["alarm"]
        assert data["key_bias"]["read"] == are_read


def test_the_keys_of_a_fused_bias_lie_after_the_queries(model):
    bias = torch.zeros(8, 128)
    bias[4:6] = 60
    folder = model("qwen2", {"model.layers.1.self_attn.qkv_proj.bias": bias.flatten()})
    checkpoint = open_checkpoint(str(folder))
    (found_bias,) = read_key_biases(checkpoint, model_attention(checkpoint.config))
    assert (found_bias.layer, found_bias.largest) == (1, 60)


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(**SMALL, intermediate_size=64),
        PersimmonConfig(**SMALL, intermediate_size=64, qk_layernorm=False),
        BloomConfig(**SMALL),
        FalconConfig(**SMALL, bias=True, multi_query=True),
        FalconConfig(**SMALL, bias=True, multi_query=False),
        FalconConfig(**SMALL, bias=True, new_decoder_architecture=True, num_kv_heads=2),
        GPT2Config(**SMALL),
        GPTBigCodeConfig(**SMALL, multi_query=True),
        GPTBigCodeConfig(n_layer=2, n_embd=64, n_head=4, vocab_size=16, multi_query=False),
    ],
    ids=lambda config: config.model_type,
)
def test_the_keys_of_a_fused_bias_are_those_of_the_model(config, tmp_path):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if re.search(r"(query_key_value|c_attn)\.", name):
            fill = torch.randn(parameter.shape, generator=random) if name.endswith("bias") else 0.0
            parameter.data.copy_(torch.as_tensor(fill))
    model.save_pretrained(tmp_path)
    cache = DynamicCache(config=config)
    # Keys are the biases where weights are zero, and rotary embeddings leave those of position 0 as they are.
    with torch.no_grad():
        model(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
    checkpoint = open_checkpoint(str(tmp_path))
    biases = read_key_biases(checkpoint, model_attention(checkpoint.config))
    assert [bias.largest for bias in biases] == pytest.approx([float(layer.keys.abs().max()) for layer in cache.layers])


def test_a_bias_of_another_model_is_refused(model, key_biases):
    outcome = run(model("qwen2", key_biases(1, size=100)))
    assert outcome.exit_code == 2
    assert "k_proj.bias has 100 numbers" in said(outcome)


def test_shards_are_found_through_their_index(model, key_biases):
    folder = model("qwen2")
    biases = key_biases(80, 0.5, 0.5)
    shards = {name: f"model-{index}-of-3.safetensors" for index, name in enumerate(biases)}
    for name, file in shards.items():
        save_file({name: biases[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    data = found(folder)[1]
    assert data["weights_bytes"] == 3 * 512
    assert len(data["key_bias"]["layers"]) == 3
    (folder / "model-1-of-3.safetensors").unlink()
    outcome = run(folder)
    assert outcome.exit_code == 2
    assert "model-1-of-3.safetensors, which is not there" in said(outcome)


def test_a_gguf_file(gguf_file):
    status, data = found(gguf_file)
    assert status == 0
    assert data["key_bias"]["alarm"]
    assert "GGUF" in data["engines"]["vllm"]["refusals"][0]
    code = data["engines"]["transformers"]["command"]
    assert 'gguf_file="tiny.gguf"' in code
    # Otherwise every forward would dequantise the weights again.
    assert code.count("GgufConfig") == (2 if gguf_weights_in_full() else 0)


@pytest.mark.parametrize("kept", [3, 30, 100, 200, -10])
def test_a_gguf_file_that_is_cut_off(gguf_file, kept):
    gguf_file.write_bytes(gguf_file.read_bytes()[:kept])
    outcome = run(gguf_file)
    assert outcome.exit_code == 2
    assert "tiny.gguf is cut off" in said(outcome)
    with pytest.raises(OSError, match="is cut off"):
        load_model(str(gguf_file), "cpu")


def test_the_code_for_transformers_runs(tmp_path, monkeypatch):
    model = LlamaForCausalLM(LlamaConfig(**SMALL, head_dim=64))
    model.save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    identity, transforms = ModelIdentity.of(model.config, "LlamaForCausalLM"), dict.fromkeys((0, 1), MEANS_ALONE)
    write_calibration("turboquant.safetensors", Calibration(transforms, identity, "tiny", num_tokens=9))
    code = found(tmp_path / "tiny")[1]["engines"]["transformers"]["command"]
    assert f"{CACHE_ARGUMENT}=cache)" in code
    exec(code, {"inputs": {"input_ids": torch.ones(1, 8, dtype=torch.long), "max_new_tokens": 2}})


def test_without_a_network_the_cache_is_read(model, monkeypatch, key_biases):
    folder = model("qwen2", key_biases(80, 0.5, 0.5))
    config = open_checkpoint(str(folder)).config
    cached = {"model.safetensors": str(folder / "model.safetensors")}
    monkeypatch.setattr(checkpoints, "try_to_load_from_cache", lambda _, filename: cached.get(filename))
    monkeypatch.setattr(checkpoints.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(models, "_config_of_hub", lambda *_: folder / "config.json")
    monkeypatch.setattr(models.AutoConfig, "from_pretrained", lambda *_, **__: config)
    assert open_checkpoint("someone/a-model").weights_nbytes == 3 * 512
    cached.clear()
    assert open_checkpoint("someone/a-model").tensors is None


def test_heads_below_128_get_more_key_bits(model):
    data = found(model("gpt-oss"))[1]
    assert data["recommended"]["preset"] == "k6v4"
    assert '{"turboquant": {"preset": "k6v4", "calibration": ' in data["engines"]["vllm"]["command"]
    assert found(model("llama"))[1]["recommended"]["preset"] == "tq4"


@pytest.mark.parametrize("name", ["gpt-oss", "llama", "gemma3"])
def test_both_engines_are_given_a_calibration_file(model, name):
    folder = model(name)
    calibrate = f"turboquant calibrate {folder} --out turboquant.safetensors\n"
    engines = found(folder)[1]["engines"]
    serve, code = (engines[engine]["command"] for engine in ("vllm", "transformers"))
    assert serve.startswith(f"{calibrate}vllm serve")
    assert '"calibration": "turboquant.safetensors"' in serve
    assert code.startswith(f"# First, in a shell: {calibrate}")
    assert 'key_transforms="turboquant.safetensors"' in code


def test_what_a_calibration_file_takes_is_named(model):
    # Of the two recommended presets one splits keys.
    assert "keys lose less, for two bytes each." in said(run(model("llama")))
    assert "keys lose less. " in said(run(model("gpt-oss")))


@pytest.mark.parametrize("name", ["gpt-oss", "llama", "gemma3"])
def test_what_a_preset_loses_is_not_claimed_but_measured(model, name):
    folder = model(name)
    recommended = found(folder)[1]["recommended"]
    command = f"turboquant eval {folder} --cache tq4 --cache k6v4 --measure quality"
    assert recommended["measure"] == command
    assert recommended["reason"].endswith("has to be measured")
    outcome = run(folder)
    assert "lose little" not in said(outcome)
    # To be copied: not wrapped.
    assert command in outcome.output


def test_what_fits_a_card(model):
    folder = model("qwen2", {"model.norm.weight": torch.ones(4)})
    assert "H200" in said(run(folder, "--gpu", "h200"))
    fit = found(folder, "--memory", "10")[1]["fit"]
    assert fit["tokens"]["tq4"] / fit["tokens"]["bf16"] == pytest.approx(512 / 132, rel=0.001)
    assert (
        found(folder, "--memory", "1")[1]["fit"]["problem"] == "weights of 0.0 GiB leave nothing of 1 GiB for a cache"
    )


def test_json_goes_to_a_file_beside_the_tables(model, tmp_path):
    path = tmp_path / "found.json"
    outcome = run(model("llama"), "--json", path)
    assert "Bytes per token" in outcome.output
    assert json.loads(path.read_text())["bytes_per_token"]["growing"]["tq4"] == 33_792


def test_an_encoder_is_refused(model):
    outcome = run(model("bert"))
    assert outcome.exit_code == 1
    assert "encoder" in said(outcome)


def test_a_folder_without_a_configuration(tmp_path):
    outcome = run(tmp_path)
    assert outcome.exit_code == 2
    assert "has no config.json" in said(outcome)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x10", "truncated"),
        (b"\xff" * 8 + b"{}", "truncated"),
        ((100).to_bytes(8, "little") + b"{", "truncated"),
        ((2).to_bytes(8, "little") + b"[]", "no readable safetensors header"),
        ((2).to_bytes(8, "little") + b"{x", "no readable safetensors header"),
    ],
)
def test_a_damaged_file_is_named(model, content, reason):
    folder = model("llama")
    (folder / "model.safetensors").write_bytes(content)
    outcome = run(folder)
    assert outcome.exit_code == 2
    assert "model.safetensors" in said(outcome)
    assert reason in said(outcome)


def test_a_file_without_its_end_is_named(model, key_biases):
    folder = model("qwen2", key_biases(1, 1, 1))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    outcome = run(folder)
    assert outcome.exit_code == 2
    assert "its tensors end at byte" in said(outcome)


def test_an_error_has_one_remedy_in_a_sentence_of_its_own(model):
    assert said(run("no-such-folder/")).endswith(
        ". Pass a hub id, a folder or a GGUF file that this machine can reach."
    )
    folder = model("llama")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    assert said(run(folder)).endswith("Use a model that this version of transformers has a class for.")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--gpu", "H900"], "GPU 'H900' is not known; known are B200, H200"),
        (["--gpu", "H200", "--memory", "80"], "give one of them"),
        (["--json", "none/found.json"], "there is no folder none"),
        (["--json", "."], "is a folder; name a file"),
    ],
)
def test_bad_arguments(model, arguments, reason):
    outcome = run(model("llama"), *arguments)
    assert outcome.exit_code == 2
    assert reason in said(outcome)


def test_cards_are_found_however_they_are_written():
    assert find_card("a100 80gb") is find_card("A100-80GB")
    assert len({card.name.lower() for card in CARDS}) == len(CARDS)
