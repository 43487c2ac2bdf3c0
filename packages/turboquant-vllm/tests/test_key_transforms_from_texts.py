from types import SimpleNamespace

import pytest
import torch

from turboquant_vllm.dense_attention import DenseAttention
from turboquant_vllm.key_transforms import from_texts
from turboquant_vllm.key_transforms.from_texts import give_text_means, shipped_texts, why_none
from turboquant_vllm.key_transforms.raw_attention import RawAttention
from turboquant_vllm.layer_transform import LayerTransform

TOKENS = [{"prompt_token_ids": list(range(start, 400, 3))} for start in (3, 5)]
FIRST = [{"prompt_token_ids": list(range(start, start + 40))} for start in (10, 300)]


def implementation(device, window=None, softcap=None, sinks=None):
    """What a layer of four heads and two KV heads attends with on a CPU."""
    return SimpleNamespace(
        dense_attention=DenseAttention(0.125, window, softcap, None),
        sinks=sinks,
        key_transform=LayerTransform(device),
    )


def draw(num_tokens, num_heads):
    return torch.randn(num_tokens, num_heads, 64, generator=torch.Generator().manual_seed(num_heads))


@pytest.mark.parametrize("chosen", [{}, {"window": 5}, {"softcap": 2.0}, {"sinks": torch.tensor([0.0, 1.0, 2.0, 3.0])}])
def test_a_text_is_attended_to_as_it_is(chosen):
    query, key, value = draw(20, 4), draw(20, 2), draw(20, 2).flip(0)
    impl = implementation(torch.device("cpu"), **chosen)
    output = torch.full_like(query, torch.nan)
    RawAttention(impl, None).forward(None, query, key, value, None, None, output)
    k, v = (x.double().repeat_interleave(2, dim=1) for x in (key, value))
    logits = torch.einsum("qhd,khd->hqk", query.double(), k) * 0.125
    if softcap := chosen.get("softcap"):
        logits = softcap * (logits / softcap).tanh()
    ahead = torch.arange(20)[None, :] - torch.arange(20)[:, None]
    logits[:, (ahead > 0) | (ahead <= -chosen.get("window", 20))] = -torch.inf
    if "sinks" in chosen:
        logits = torch.cat([logits, chosen["sinks"].double()[:, None, None].expand(-1, 20, 1)], dim=-1)
    expected = torch.einsum("hqk,khd->qhd", logits.softmax(-1)[..., :20], v)
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def test_the_mean_is_that_of_the_keys_of_all_texts():
    impl = implementation(torch.device("cpu"))
    attention = RawAttention(impl, None)
    keys = [draw(20, 2), 3 + draw(7, 2)]
    for key in keys:
        query = draw(len(key), 4)
        attention.forward(None, query, key, key, None, None, torch.empty_like(query))
    assert attention.settle()
    torch.testing.assert_close(impl.key_transform.settled.mean, torch.cat(keys).mean(0))


def test_keys_that_are_not_finite_leave_their_layer_without_a_mean():
    impl = implementation(torch.device("cpu"))
    attention = RawAttention(impl, None)
    key = draw(20, 2)
    key[3, 1, 7] = torch.inf
    attention.forward(None, draw(20, 4), key, key, None, None, torch.empty(20, 4, 64))
    assert not attention.settle()
    assert impl.key_transform.is_settled
    assert impl.key_transform.settled.mean is None


def test_a_layer_that_shares_a_cache_reads_that_of_the_other():
    first, second = (implementation(torch.device("cpu")) for _ in range(2))
    owner = RawAttention(first, None)
    query, key, value = draw(20, 4), draw(20, 2), draw(20, 2).flip(0)
    expected, output = torch.empty_like(query), torch.empty_like(query)
    owner.forward(None, query, key, value, None, None, expected)
    sharing = RawAttention(second, owner)
    sharing.forward(None, query, None, None, None, None, output)
    assert torch.equal(output, expected)


def test_the_texts_are_of_several_kinds_and_always_the_same():
    texts = shipped_texts()
    assert len(texts) == 4
    assert all(300 < len(text) < 1000 for text in texts)
    assert any("def " in text for text in texts)


@pytest.mark.parametrize(
    ("load_format", "is_hybrid", "reason"),
    [("auto", False, None), ("dummy", False, "load_format is dummy"), ("auto", True, "layers with a state")],
)
def test_no_mean_is_taken_of_keys_that_would_be_others(load_format, is_hybrid, reason):
    config = SimpleNamespace(
        load_config=SimpleNamespace(load_format=load_format), model_config=SimpleNamespace(is_hybrid=is_hybrid)
    )
    found = why_none(config)
    assert (found is None) if reason is None else (reason in found)


def test_a_draft_is_left_without_means(monkeypatch):
    monkeypatch.setattr(from_texts, "why_none", lambda config: None)
    monkeypatch.setattr(from_texts, "model_with", lambda layers, model_config: None)
    impl = implementation(torch.device("cpu"))
    config = SimpleNamespace(
        model_config=None,
        compilation_config=SimpleNamespace(static_forward_context={"draft": SimpleNamespace(impl=impl)}),
    )
    give_text_means(["draft"], config, torch.device("cpu"))
    assert impl.key_transform.is_settled
    assert impl.key_transform.settled.mean is None


def test_no_first_prompt_changes_an_answer(generate, tiny_model):
    options = {
        "model": tiny_model("Llama"),
        "skip_tokenizer_init": True,
        "max_tokens": 10,
        "attention_backend": "CUSTOM",
        # One after the other.
        "max_num_seqs": 1,
    }
    found, expected = (generate([first, *TOKENS], **options) for first in FIRST)
    assert found["tokens"][0][0] != expected["tokens"][0][0]
    for name in ("tokens", "logprobs"):
        assert found[name][0][1:] == expected[name][0][1:]
