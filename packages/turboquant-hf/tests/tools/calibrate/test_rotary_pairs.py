import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Cohere2Config,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    PhiConfig,
    SmolLM3Config,
)

from turboquant_core.model_identity import ModelIdentity
from turboquant_hf.tools.calibrate.rotary_pairs import rotary_pairs

TOKENS = torch.arange(3, 90)[None]
SIZE = 32


def halves(rotary_dim):
    return [*list(range(rotary_dim // 2)) * 2, *range(rotary_dim, SIZE)]


NEIGHBOURS = [channel // 2 for channel in range(SIZE)]
SINGLE = list(range(SIZE))
SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": SIZE,
    "pad_token_id": 0,
}
OLD = {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 2}
MODELS = {
    "halves": (LlamaConfig, SMALL, [halves(SIZE)] * 2),
    "a half turned, of them halves": (PhiConfig, SMALL | {"num_key_value_heads": 2}, [halves(16)] * 2),
    "a quarter": (GPTNeoXConfig, SMALL, [halves(8)] * 2),
    "neighbours, of a half": (GlmConfig, SMALL, [NEIGHBOURS] * 2),
    "neighbours, as complex numbers, and a layer without": (
        Llama4TextConfig,
        SMALL | {"intermediate_size_mlp": 32, "num_local_experts": 2, "no_rope_layers": [1, 0]},
        [NEIGHBOURS, SINGLE],
    ),
    "neighbours in windows alone": (
        Cohere2Config,
        SMALL | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        [NEIGHBOURS, SINGLE],
    ),
    "a layer without": (SmolLM3Config, SMALL | {"no_rope_layers": [1, 0]}, [halves(SIZE), SINGLE]),
    "positions that are added, and few": (GPT2Config, OLD | {"n_positions": 100}, [SINGLE] * 2),
    "positions in scores, and none asked for": (BloomConfig, {**OLD, "hidden_size": 64}, [SINGLE] * 2),
}


def found(model):
    return rotary_pairs(model, TOKENS, ModelIdentity.of(model.config, type(model).__name__))


def new_model(kind, options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(kind(**options)).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_pairs_are_those_that_the_model_turns(name, dtype):
    kind, options, expected = MODELS[name]
    pairs = found(new_model(kind, options).to(dtype))
    assert {index: each.tolist() for index, each in pairs.items()} == dict(enumerate(expected))


def test_what_turns_no_pairs_is_not_guessed(monkeypatch):
    model = new_model(LlamaConfig, SMALL)

    def stretched(x, position_ids):
        angle = position_ids[..., None] * torch.linspace(0.1, 1, SIZE)
        return 1 + angle, angle.sin()

    monkeypatch.setattr(model.model.rotary_emb, "forward", stretched)
    assert set(found(model).values()) == {"its rotary embedding turns channels in no pairs that are known"}


def test_a_rotary_embedding_that_cannot_be_asked_is_not_guessed():
    class WithoutPositions(type(new_model(LlamaConfig, SMALL))):
        def forward(self, input_ids, past_key_values, use_cache, logits_to_keep):
            return super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)

    model = new_model(LlamaConfig, SMALL)
    model.__class__ = WithoutPositions
    assert set(found(model).values()) == {"the model takes no positions, which would show its rotary pairs"}
