"""Gemma 4: layers of two head sizes, with windows and without, of which the last read the cache of others."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

LAYERS = ["sliding_attention", "full_attention"] * 3
# In chunks of 64: one chunk, a chunk and another, one token after one and two chunks, and few tokens after a chunk.
PROMPTS = [{"prompt_token_ids": list(range(20, 20 + length))} for length in (20, 100, 65, 129, 72)]
OPTIONS = {"skip_tokenizer_init": True, "max_tokens": 1, "max_num_batched_tokens": 64, "max_num_seqs": 1}


@pytest.fixture(scope="module")
def model(tiny_sizes, tmp_path_factory):
    """A folder with a small random model."""
    torch.manual_seed(0)
    sizes = tiny_sizes | {"num_hidden_layers": 6, "head_dim": 256}
    config = transformers.Gemma4TextConfig(
        **sizes, global_head_dim=512, sliding_window=32, layer_types=LAYERS, num_kv_shared_layers=2,
        vocab_size_per_layer_input=500, hidden_size_per_layer_input=16,
    )  # fmt: skip
    made = transformers.AutoModelForCausalLM.from_config(config)
    for name, weight in made.named_parameters():
        if "q_norm" in name:
            # It is all that scales the logits: at 1 a token sees one other, and noise decides which.
            torch.nn.init.constant_(weight, 0.05)
    folder = tmp_path_factory.mktemp("Gemma4")
    made.save_pretrained(folder)
    # vLLM 0.29 reads norms of the keys of layers that have none.
    file = folder / "model.safetensors"
    weights = load_file(file)
    norm = "model.layers.{}.self_attn.k_norm.weight"
    weights |= {norm.format(layer + 2): weights[norm.format(layer)].clone() for layer in (2, 3)}
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def test_heads_of_two_sizes_and_layers_that_share_a_cache(generate, model, itemsize):
    if torch.cuda.is_available():
        pytest.importorskip("cutlass", reason="FlashAttention 4, which alone takes heads of 512, is written in cutlass")
    expected = generate(PROMPTS, model=model, **OPTIONS)
    found = generate(
        PROMPTS, model=model, **OPTIONS, attention_backend="CUSTOM",
        additional_config={"turboquant": {"key_bits": 8, "value_bits": 8}},
    )  # fmt: skip
    for (step,), (other,) in zip(found["logprobs"][0], expected["logprobs"][0], strict=True):
        shared = step.keys() & other.keys()
        assert len(shared) >= 3
        assert max(abs(step[token] - other[token]) for token in shared) < 0.05
    # A layer with a window takes half the bytes of another for a token, and twice the tokens in a page.
    assert found["kv_tokens"] / expected["kv_tokens"] == pytest.approx(1024 * itemsize / 1032, rel=0.02)
