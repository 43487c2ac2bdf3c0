import math
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    Gemma3TextConfig,
    Gemma4TextConfig,
    LlamaConfig,
    Qwen3NextConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from turboquant_core import MSEQuantizer
from turboquant_core.key_transform import KeyTransform
from turboquant_core.pair_transform import pair_transform
from turboquant_hf.attending import attending
from turboquant_hf.tools.article import article
from turboquant_hf.tools.calibrate import measure as module
from turboquant_hf.tools.calibrate import probes
from turboquant_hf.tools.calibrate.measure import CHUNK_SIZE, measure, num_forwards
from turboquant_hf.tools.calibrate.probes import read_back
from turboquant_hf.tools.calibrate.render import summary
from turboquant_hf.tools.calibrate.sums import Sums
from turboquant_hf.tools.calibrate.texts import shipped_texts, split_tokens

SIZE = 64
SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": SIZE,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
GEMMA = SMALL | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
HALVES = torch.arange(SIZE // 2).repeat(2)
MEASURED, HELD_OUT = torch.randint(3, 100, (1, 890), generator=torch.Generator().manual_seed(1)).split([690, 200], 1)


def new_model(kind=LlamaConfig, **options):
    """One whose keys and queries differ much from pair to pair."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**{**SMALL, **options})).eval()
    for name, weight in model.named_parameters():
        if name.endswith(("k_proj.weight", "q_proj.weight")):
            spread = torch.randn(weight.shape[0] // SIZE, SIZE // 2).mul(0.7).exp().repeat(1, 2)
            weight.data *= 4 * spread.flatten()[:, None]
    return model


def measured(model, tokens=MEASURED, on_forward=lambda: None):
    return measure(SimpleNamespace(model=model, name="a/model"), tokens, HELD_OUT, on_forward)


def seen_by_attention(model, tokens=MEASURED):
    """Keys [num_kv_heads, num_tokens, head_dim] of each layer in one forward pass, and the calls that read them."""
    keys, calls = {}, {}

    def attend(attending_module, query, key, value, mask, **kwargs):
        owner = next((index for index, known in keys.items() if known is key), attending_module.layer_idx)
        keys[owner] = key
        calls.setdefault(owner, []).append((query[0], value[0], mask, kwargs["scaling"]))
        return sdpa_attention_forward(attending_module, query, key, value, mask, **kwargs)

    AttentionInterface.register("seen", attend)
    AttentionMaskInterface.register("seen", sdpa_mask)
    with attending(model, "seen"), torch.inference_mode():
        model(tokens, past_key_values=DynamicCache())
    return {index: (key[0], calls[index]) for index, key in keys.items()}


def assert_those_of(found, keys, calls, pairs=HALVES, first=1, recent=8):
    """Energies of keys and queries in which each pair counts by what an error in its score moves."""
    keys, num_tokens = keys.double(), keys.shape[1]
    mean = keys[:, first:].mean(1)
    key_energy, query_energy = torch.zeros(2, *mean.shape, dtype=torch.float64)
    token = torch.arange(num_tokens)
    is_code = (token[None] >= first) & (token[:, None] - token[None] >= recent)
    for head in range(len(keys)):
        counted, key_total, query_total = 0, 0, 0
        for queries, values, mask, scaling in calls:
            group, value = len(queries) // len(keys), values[head].double()
            for query in queries[head * group : (head + 1) * group].double():
                seen = token[:, None] >= token[None] if mask is None else mask[0, 0]
                weights = (query @ keys[head].T * scaling).masked_fill(~seen, -torch.inf).softmax(-1)
                moved = (value[None] - (weights @ value)[:, None]).square().sum(-1)
                counts = weights.square() * moved * is_code
                counted = counted + counts.sum()
                key_total = key_total + counts.sum(0) @ (keys[head] - mean[head]).square()
                query_total = query_total + counts.sum(1) @ query.square()
        key_energy[head], query_energy[head] = key_total / counted, query_total / counted
    expected = pair_transform(mean.float(), key_energy, query_energy, pairs)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.scale, expected.scale, rtol=1e-3, atol=1e-4)
    if found.order is not None:
        assert torch.equal(found.order, expected.order)


def test_keys_and_queries_are_those_that_attention_sees():
    model, forwards = new_model(), []
    found = measured(model, on_forward=lambda: forwards.append(None))
    assert len(forwards) == num_forwards(690, 200) == 7
    assert MEASURED.shape[1] > CHUNK_SIZE
    seen = seen_by_attention(model)
    for index, layer in found.layers.items():
        assert_those_of(layer.transform, *seen[index])
        assert_those_of(found.calibration.codes_only[index], *seen[index], first=0, recent=0)
        assert layer.kind == "scale and order"
        assert layer.errors["scale and order"] < 0.8 * layer.errors["mean"]
        assert layer.left == {}
    assert (found.calibration.num_tokens, found.calibration.source) == (690, "a/model")
    assert {index: layer.transform for index, layer in found.layers.items()} == found.calibration.layers
    assert model.config._attn_implementation == "sdpa"


def test_what_is_tried_is_read_where_a_cache_would_read_codes(monkeypatch):
    """Keys that are far off, in float64: those of the held-out tokens but the newest eight of each query."""
    model = new_model(num_hidden_layers=1)
    noise = torch.randn(1, HELD_OUT.shape[1], 2, SIZE, generator=torch.Generator().manual_seed(7)) / 4
    monkeypatch.setattr(probes, "read_back", lambda keys, transform: keys + noise[0])
    found = measured(model).layers[0].errors["mean"]
    whole = torch.cat([MEASURED, HELD_OUT], 1)
    keys, ((queries, values, _, scaling),) = seen_by_attention(model, whole)[0]
    keys, values, queries = (x.double() for x in (keys, values, queries))
    token, first = torch.arange(whole.shape[1]), MEASURED.shape[1]
    changed = keys.clone()
    changed[:, first:] += noise[0].transpose(0, 1)
    error = total = 0
    for head, query in enumerate(queries):
        exact, other = (query @ x[head // 2].T * scaling for x in (keys, changed))
        other = torch.where(token[:, None] - token[None] >= 8, other, exact)
        a, b = (
            x.masked_fill(token[:, None] < token[None], -torch.inf).softmax(-1)[first:] @ values[head // 2]
            for x in (exact, other)
        )
        error, total = error + (a - b).square().sum(), total + a.square().sum()
    assert found == pytest.approx(float(error / total), rel=1e-3)


def test_sliding_windows_count_and_so_do_tokens_that_have_left_them():
    model = new_model(Gemma3TextConfig, **GEMMA)
    # One pass over all of them has keys of all tokens, if no cache forgets them.
    for index, seen in seen_by_attention(model).items():
        assert_those_of(measured(model).layers[index].transform, *seen)


def test_queries_of_a_layer_that_shares_keys_count_for_the_layer_whose_keys_they_read():
    options = {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 4096,
        "global_head_dim": SIZE,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 100,
    }
    model = new_model(Gemma4TextConfig, **options)
    found, seen = measured(model).layers, seen_by_attention(model)
    assert found.keys() == {0, 1}
    assert [len(calls) for _, calls in seen.values()] == [1, 2]
    for index, layer in found.items():
        assert_those_of(layer.transform, *seen[index])


def test_layers_without_keys_are_none():
    options = {
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    }
    assert measured(new_model(Qwen3NextConfig, **options)).layers.keys() == {1}


def test_a_model_with_an_attention_of_its_own_has_means():
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=100, hidden_size=64, n_layer=2, n_head=2)).eval()
    for layer in measured(model).layers.values():
        assert layer.transform.tensors().keys() == {"key_mean"}
        assert layer.left == {None: "BloomForCausalLM does not attend through transformers' AttentionInterface"}


def test_a_head_that_no_query_reads_stays_as_it_is():
    model = new_model()
    model.model.layers[1].self_attn.q_proj.weight.data[2 * SIZE :] = 0
    found = measured(model)
    layer = found.layers[1]
    assert layer.left == {1: "no query reads it"}
    assert torch.equal(layer.transform.scale[1], torch.ones(SIZE))
    assert not torch.equal(layer.transform.scale[0], torch.ones(SIZE))
    assert "not scaled, layer 1 (head 1): no query reads it" in said(found)


def test_a_layer_that_gains_nothing_keeps_its_mean_alone(monkeypatch):
    def spoilt(mean, key_energy, *arguments):
        return KeyTransform(mean, torch.full_like(mean, 30).pow(torch.linspace(-1, 1, SIZE)))

    monkeypatch.setattr(module, "pair_transform", spoilt)
    found = measured(new_model())
    for layer in found.layers.values():
        assert layer.kind == "mean"
        assert layer.transform.tensors().keys() == {"key_mean"}
        assert layer.errors["scale"] > layer.errors["mean"]
    assert "not scaled, layer 0, 1: nothing tried errs less than the mean alone" in said(found)


def said(found):
    return " ".join(summary("a.safetensors", "a/model", found.layers, num_tokens=690, num_held_out=200))


def test_what_is_said_of_it():
    found = measured(new_model())
    before, after = (
        sum(layer.errors[kind] for layer in found.layers.values()) / 2 for kind in ("mean", "scale and order")
    )
    assert said(found) == (
        "a.safetensors: calibration of 2 layers of a/model, over 690 tokens 2 of them scaled: with keys of 3 bits the "
        f"squared error of their attention is {after:.2%} instead of {before:.2%}, on 200 tokens that were held out"
    )


@pytest.mark.parametrize("scale", [None, torch.rand(2, SIZE, generator=torch.Generator().manual_seed(2)) + 0.5])
def test_keys_are_read_back_from_codes_in_halves_of_unequal_bits(scale):
    generator = torch.Generator().manual_seed(3)
    keys, order = torch.randn(9, 2, SIZE, generator=generator), torch.rand(2, SIZE, generator=generator).argsort(-1)
    transform = KeyTransform(None, scale, order)
    stored, halves = transform.of_keys(keys), []
    for half, bits in ((stored[..., : SIZE // 2], 4), (stored[..., SIZE // 2 :], 2)):
        quantizer = MSEQuantizer(SIZE // 2, bits, "unbiased")
        halves.append(quantizer.dequantize(quantizer.quantize(half)))
    assert torch.equal(read_back(keys, transform), transform.restored(torch.cat(halves, -1)))
    whole = MSEQuantizer(SIZE, 3, "unbiased")
    transform = KeyTransform(None, scale)
    expected = transform.restored(whole.dequantize(whole.quantize(transform.of_keys(keys).float())))
    assert torch.equal(read_back(keys, transform), expected)


def test_sums_bear_a_mean_that_is_far_larger_than_what_keys_differ_by():
    sums = Sums()
    for seed in range(2):
        keys = 3000 + torch.randn(1, 500, 8, generator=torch.Generator().manual_seed(seed))
        sums.add_keys(keys)
        sums.add_pairs(torch.full((1, 3, 8), 2.0), keys, torch.full((1, 3, 500), 1e-6))
    keys, queries = sums.energies
    torch.testing.assert_close(keys, torch.ones(1, 8).double(), rtol=0.15, atol=0)
    torch.testing.assert_close(queries, torch.full((1, 8), 4.0).double())


def test_where_no_pair_counts_there_is_no_energy():
    sums = Sums()
    sums.add_keys(torch.ones(2, 5, 8))
    assert [x.tolist() for x in sums.energies] == [[[0.0] * 8] * 2] * 2
    sums.add_pairs(torch.ones(2, 3, 8), torch.ones(2, 5, 8), torch.zeros(2, 3, 5))
    assert [x.tolist() for x in sums.energies] == [[[0.0] * 8] * 2] * 2


def test_every_text_has_a_share_and_is_held_out_in_part():
    texts = [torch.full((length,), kind) for kind, length in enumerate((1000, 100, 700))]
    kept, held_out = split_tokens(texts, 1100)
    assert kept.shape == (1, 880)
    assert [int((kept == kind).sum()) for kind in range(3)] == [400, 80, 400]
    assert [int((held_out == kind).sum()) for kind in range(3)] == [100, 20, 100]
    kept, held_out = split_tokens([torch.arange(50)], 1000)
    assert torch.equal(torch.cat([kept, held_out], 1)[0], torch.arange(50))


def test_no_shipped_text_is_what_other_commands_score():
    texts = shipped_texts()
    assert len(texts) == 5
    for text in texts:
        assert math.isclose(len(text), 3000, rel_tol=0.4)
        assert not set(text.splitlines()) & set(article().splitlines()) - {""}
