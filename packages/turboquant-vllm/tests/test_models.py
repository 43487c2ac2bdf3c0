"""vLLM's engine with small random models: kinds of layers, and features that come between a model and its cache."""

import json

import pytest
import torch
import transformers
import vllm
from packaging.version import Version
from vllm.config import cache

OLD = Version(vllm.__version__) < Version("0.31")
TOKENS = [{"prompt_token_ids": list(range(start, 400, 3))} for start in (3, 5)]
IMAGES = [{"prompt": "<image> " + " ".join(f"t{n}" for n in range(40, 240, 3)), "image": c} for c in ("red", "blue")]
TINY = {"skip_tokenizer_init": True, "max_tokens": 30}
CHUNKS = {"max_num_batched_tokens": 64, "max_num_seqs": 8}
EIGHT_BITS = {
    "attention_backend": "CUSTOM",
    "additional_config": {"turboquant": {"key_bits": 8, "value_bits": 8}},
}


@pytest.fixture(scope="module")
def plain(generate, tiny_model, drafts):
    """What the small Llama says at 8 bits: of texts of its own, and of those that it wrote with drafts."""
    free = [None] * len(TOKENS)
    texts = [text for answer in drafts.values() for text in answer["tokens"][0]]
    return generate(TOKENS * (1 + len(drafts)), model=tiny_model("Llama"), forced=[*free, *texts], **TINY, **EIGHT_BITS)


@pytest.fixture(scope="module")
def drafts(generate, tiny_model, eagle):
    """What the small Llama says at 8 bits with drafts: of itself on an uncompressed cache, and of EAGLE's kind."""
    model = tiny_model("Llama")
    kinds = {
        "draft_model": {"model": str(model)},
        "eagle": {"model": str(eagle), "attention_backend": "CUSTOM"},
    }
    return {
        method: generate(
            TOKENS, model=model, **TINY, **EIGHT_BITS,
            speculative_config={"method": method, "num_speculative_tokens": 3, **options},
        )
        for method, options in kinds.items()
    }  # fmt: skip


@pytest.mark.skipif(not hasattr(cache, "register_kv_cache_dtype"), reason="vLLM before 0.33 has no such hook")
def test_a_preset_as_the_type_of_the_cache(generate, tiny_model):
    tiny = {"model": tiny_model("Llama"), **TINY, "attention_backend": "CUSTOM"}
    found, expected = (
        generate(TOKENS, **tiny, **preset)
        for preset in (
            {"kv_cache_dtype": "k8v4"},
            {"additional_config": {"turboquant": {"preset": "k8v4"}}},
        )
    )
    assert (found["tokens"], found["kv_tokens"]) == (expected["tokens"], expected["kv_tokens"])


@pytest.mark.parametrize("architecture", ["Gemma2", "Gemma3Text", "GptOss"])
def test_layers_with_and_without_windows(generate, tiny_model, architecture, itemsize, assert_near):
    tiny = {"model": tiny_model(architecture), **TINY, **CHUNKS}
    if torch.cuda.is_available():
        # vLLM refuses Gemma 2 and 3 in float16.
        tiny["dtype"] = "bfloat16"
    elif architecture == "GptOss" and OLD:
        # It served gpt-oss on a CPU in this alone.
        tiny["dtype"], itemsize = "bfloat16", 2
    expected = generate(TOKENS, **tiny)
    found = generate(TOKENS, **tiny, forced=expected["tokens"][0], **EIGHT_BITS)
    assert_near(found, expected)
    assert found["kv_tokens"] / expected["kv_tokens"] == pytest.approx(128 * itemsize / 132, rel=0.02)


def test_layers_of_linear_attention_stay_vllms_own(generate, tiny_model, assert_near):
    if torch.cuda.is_available():
        # vLLM computes linear attention with it on Hopper.
        pytest.importorskip("flashinfer")
    # vLLM's linear attention for CPUs takes bfloat16 only.
    tiny = {"model": tiny_model("Qwen3Next"), **TINY, **CHUNKS, "dtype": "bfloat16"}
    expected = generate(TOKENS, **tiny)
    found = generate(TOKENS, **tiny, forced=expected["tokens"][0], **EIGHT_BITS)
    assert_near(found, expected)
    assert found["kv_tokens"] > 1.9 * expected["kv_tokens"]


@pytest.mark.skipif(OLD, reason="vLLM before 0.31 serves no Idefics 3 with transformers 5.19 or newer")
def test_images(request, generate, tiny_vision_model, assert_near):
    # Before 5.19 transformers has no image processor without torchvision.
    older = Version(transformers.__version__) < Version("5.19")
    env = request.getfixturevalue("with_torchvision") if older else {}
    tiny = {"model": tiny_vision_model, "max_tokens": 30, "env": env, **CHUNKS}
    expected = generate(IMAGES, **tiny)
    # The prompts differ in their image alone.
    assert expected["tokens"][0][0] != expected["tokens"][0][1]
    assert_near(generate(IMAGES, **tiny, forced=expected["tokens"][0], **EIGHT_BITS), expected)


def test_an_adapter(generate, tiny_model, adapter, plain, assert_near):
    tiny = {"model": tiny_model("Llama"), **TINY, "lora": adapter, "enable_lora": True, "max_lora_rank": 8}
    expected = generate(TOKENS, **tiny)
    assert expected["tokens"][0] != plain["tokens"][0][: len(TOKENS)]
    assert_near(generate(TOKENS, **tiny, forced=expected["tokens"][0], **EIGHT_BITS), expected)


def test_two_ranks_say_what_one_says(generate, tiny_model, plain, texts_of, two_ranks, assert_near):
    expected = texts_of(plain, slice(2))
    found = generate(TOKENS, model=tiny_model("Llama"), **TINY, **EIGHT_BITS, **two_ranks, forced=expected["tokens"][0])
    # They take their key means together, at start: with others they would say something else, if not much.
    assert_near(found, expected, **({} if torch.cuda.is_available() else {"largest": 0.01, "mean": 0.001}))


def test_a_draft_model(drafts, plain, texts_of, assert_near):
    found = drafts["draft_model"]
    # It is the model itself, on an uncompressed cache of its own: near-ties alone are refused.
    assert found["accepted"] > 0.7 * found["drafted"] > 0
    assert_near(found, texts_of(plain, slice(2, 4)))


def test_an_eagle_draft(drafts, plain, texts_of, assert_near):
    found = drafts["eagle"]
    # It is random, so that almost all it says is refused and written over.
    assert found["drafted"] > 100 > found["accepted"]
    assert_near(found, texts_of(plain, slice(4, 6)))


@pytest.fixture(scope="module")
def adapter(tiny_model, tmp_path_factory):
    """A random LoRA adapter of the small Llama: what it adds to a weight is half as large as the weight."""
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(4):
        for name, size in {"q_proj": 256, "k_proj": 128, "v_proj": 128}.items():
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = 0.15 * torch.randn(8, 128, generator=random)
            tensors[f"{module}.lora_B.weight"] = 0.15 * torch.randn(size, 8, generator=random)
    folder = tmp_path_factory.mktemp("adapter")
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def eagle(tiny_model, tmp_path_factory):
    """An EAGLE draft for the small Llama: its first layer behind a random projection."""
    from safetensors.torch import load_file, save_file

    model = tiny_model("Llama")
    weights = load_file(model / "model.safetensors")
    draft = {
        name.removeprefix("model."): weight
        for name, weight in weights.items()
        if name.startswith("model.layers.0.") and "input_layernorm" not in name
    }
    draft["fc.weight"] = 0.1 * torch.randn(128, 256, generator=torch.Generator().manual_seed(1))
    folder = tmp_path_factory.mktemp("eagle")
    save_file(draft, folder / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    return folder
