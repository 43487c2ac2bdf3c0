import pytest
import torch
from transformers import (
    AutoTokenizer,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from turboquant_core import KeyTransform
from turboquant_hf import TurboQuantCache
from turboquant_hf.attending import attending
from turboquant_hf.tools.eval.greedy import continuations, greedy_prompts, shared_length
from turboquant_hf.tools.eval.layer_errors import layer_errors
from turboquant_hf.tools.eval.needle import find_needle, needle_prompt
from turboquant_hf.tools.eval.prefill import fill


@pytest.fixture
def text_ids():
    return torch.randint(100, (600,), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder):
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def small(**kwargs):
    return {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, **kwargs}


def gemma():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    sizes = small(num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(1)
    return Gemma3ForCausalLM(Gemma3TextConfig(**sizes, sliding_window=24, layer_types=kinds)).eval()


def qwen3_next():
    config = Qwen3NextConfig(
        **small(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1),
        linear_num_key_heads=1,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    )
    torch.manual_seed(1)
    return Qwen3NextForCausalLM(config).eval()


@pytest.mark.parametrize("make", [gemma, qwen3_next, None])
def test_one_prefill_fills_caches_as_each_of_their_own_does(make, tiny_model, text_ids):
    model = make() if make else tiny_model
    prompt, step = text_ids[None, :60], text_ids[None, 60:70]
    kinds = {
        "plain": lambda: DynamicCache(config=model.config),
        "tq4": lambda: TurboQuantCache(model.config),
        "tq2": lambda: TurboQuantCache(model.config, "tq2"),
    }
    shared = {name: new() for name, new in kinds.items()}
    fill(model, prompt, shared.values())
    for name, new in kinds.items():
        alone = new()
        with torch.no_grad():
            model(prompt, past_key_values=alone)
            expected = model(step, past_key_values=alone).logits
            actual = model(step, past_key_values=shared[name]).logits
        torch.testing.assert_close(actual, expected, msg=name)


@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_a_prompt_has_the_length_and_the_needle_where_it_is_asked_for(tokenizer, depth):
    # The tokenizer knows words; one that knows characters has digits.
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    characters = {character: index for index, character in enumerate(map(chr, range(128)))}
    plain = Tokenizer(models.WordLevel(characters, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?")
    hay = torch.tensor([ord("h")] * 50)
    prompt = needle_prompt(letters, hay, 400, depth, seed=0)
    haystack, question = ("".join(chr(token) for token in ids[0]) for ids in (prompt.haystack, prompt.question))
    answer = "".join(chr(token) for token in prompt.answer)
    assert len(haystack) % 16 == 0
    assert 384 < len(haystack) + len(question) + len(answer) <= 400
    before, needle, after = haystack.partition("\nThe secret number of")
    assert needle
    assert len(before) / haystack.count("h", 0, len(before)) == 1
    hay_after = after.count("hh")
    assert {0: len(before) == 1, 0.5: abs(len(before) - 2 * hay_after) < 12, 1: hay_after == 0}[depth]
    city = after.split()[0]
    assert f"secret number of {city} is{answer}." in f"secret number of{after}"
    assert question.endswith(f"The secret number of {city} is")
    again = needle_prompt(letters, hay, 400, depth, seed=0)
    assert torch.equal(again.haystack, prompt.haystack)
    assert not torch.equal(needle_prompt(letters, hay, 400, depth, seed=1).answer, prompt.answer)


def test_a_needle_counts_as_found_when_greedy_decoding_says_it(tiny_model, tokenizer, text_ids):
    prompt = needle_prompt(tokenizer, text_ids, 120, 0.5, seed=0)
    cache = TurboQuantCache(tiny_model.config, "tq2")
    with torch.no_grad():
        tiny_model(prompt.haystack, past_key_values=cache)
        logits = tiny_model(prompt.question, past_key_values=cache).logits
        said = []
        for _ in range(4):
            said.append(int(logits[0, -1].argmax()))
            logits = tiny_model(torch.tensor([said[-1:]]), past_key_values=cache).logits
    for answer, found in ((said, True), ([*said[:3], (said[3] + 1) % 1500], False)):
        asked = type(prompt)(prompt.haystack, prompt.question, torch.tensor(answer))
        score = find_needle(tiny_model, asked, {"tq2": TurboQuantCache(tiny_model.config, "tq2")})["tq2"]
        assert score.found is found
        assert score.share == (1 if found else 0.75)


def test_continuations_are_those_of_generate(tiny_model, text_ids):
    prompts = greedy_prompts(text_ids)
    assert prompts.shape == (4, 128)
    assert torch.equal(prompts[-1], text_ids[-128:])
    found = continuations(tiny_model, prompts, TurboQuantCache(tiny_model.config), 5)
    expected = tiny_model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=TurboQuantCache(tiny_model.config),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
    )
    assert found == expected[:, 128:].tolist()


def test_where_continuations_part():
    assert shared_length([1, 2, 3], [1, 2, 3]) == 3
    assert shared_length([1, 2, 3], [1, 5, 3]) == 1
    assert shared_length([1], [2]) == 0


def test_errors_of_layers_are_those_of_the_codebook(tiny_model, text_ids):
    bits = {"8": (8, 8), "4": (4, 4), "3": (3, 3)}
    errors = layer_errors(tiny_model, text_ids[None], bits)
    # Table of the codebook: normalised error at head_dim 64.
    for name, expected in (("4", 0.009132), ("3", 0.033391)):
        assert [error.index for error in errors[name]] == [0, 1]
        for error in errors[name]:
            assert error.key_error == pytest.approx(expected, rel=0.2)
            assert error.value_error == pytest.approx(expected, rel=0.2)
    for coarse, fine in zip(errors["4"], errors["8"], strict=True):
        assert 0 < fine.output_error < coarse.output_error < 0.1


@pytest.mark.parametrize(
    "transforms", [{}, {0: KeyTransform(order=torch.arange(64).flip(0).repeat(2, 1))}], ids=["whole", "split keys"]
)
def test_an_error_is_that_of_the_layers_own_attention(tiny_model, text_ids, transforms):
    """Worked out by hand for the first layer, whose inputs nothing before it can have moved."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    ids = text_ids[None, :80]
    layer, rotary = tiny_model.model.layers[0], tiny_model.model.rotary_emb
    with torch.no_grad():
        hidden = layer.input_layernorm(tiny_model.model.embed_tokens(ids))
        query, key, value = (
            getattr(layer.self_attn, f"{name}_proj")(hidden).view(1, 80, -1, 64).transpose(1, 2) for name in "qkv"
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary(hidden, torch.arange(80)[None]))
        options = {"key_bits": 2, "value_bits": 4, "recent_tokens": 0, "key_transforms": transforms}
        cache = TurboQuantCache(tiny_model.config, **options)
        cache.update(key, value, 0)
        stored = cache.layers[0].store.dequantize(key.dtype)
        outputs = []
        for token in range(80):
            newest = max(0, token - 7)
            # The first token is stored as it is.
            read = [
                torch.cat([codes[:, :, :newest], raw[:, :, newest : token + 1]], dim=2)
                for codes, raw in zip(stored, (key, value), strict=True)
            ]
            outputs.append(
                [
                    torch.nn.functional.scaled_dot_product_attention(
                        query[:, :, token : token + 1], *states, enable_gqa=True
                    )
                    for states in (read, [x[:, :, : token + 1] for x in (key, value)])
                ]
            )
        actual, exact = (torch.cat(part, dim=2) for part in zip(*outputs, strict=True))
    found = layer_errors(tiny_model, ids, {"k2v4": (2, 4)}, transforms)["k2v4"][0]
    assert found.output_error == pytest.approx(relative(actual, exact), rel=1e-3)
    # Keys and values are as the token after the text reads them.
    last = [
        torch.cat([codes[:, :, :73], raw[:, :, 73:]], dim=2) for codes, raw in zip(stored, (key, value), strict=True)
    ]
    assert found.value_error == pytest.approx(relative(last[1], value), rel=1e-3)
    assert found.key_error == pytest.approx(
        relative(last[0], key) * float(key.square().sum() / (key - key.mean(2, keepdim=True)).square().sum()), rel=1e-3
    )


def relative(found, exact):
    return float((found - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize(("make", "indices"), [(gemma, [0, 1, 2]), (qwen3_next, [1])])
def test_layers_with_a_window_and_without_keys(make, indices, text_ids):
    errors = layer_errors(make(), text_ids[None, :100], {"4": (4, 4)})["4"]
    assert [error.index for error in errors] == indices
    assert all(0 < error.output_error < 0.2 for error in errors)


def test_a_model_attends_as_before_afterwards(tiny_model, text_ids):
    before = tiny_model.config._attn_implementation
    layer_errors(tiny_model, text_ids[None, :40], {"4": (4, 4)})
    assert tiny_model.config._attn_implementation == before
    with attending(tiny_model, "eager"):
        assert tiny_model.config._attn_implementation == "eager"
    assert tiny_model.config._attn_implementation == before
