import pytest
import torch
from transformers import DynamicCache

from turboquant_hf import TurboQuantCache
from turboquant_hf.scoring import score_caches


@pytest.fixture
def text():
    return torch.randint(1500, (1, 90), generator=torch.Generator().manual_seed(2))


def score(model, text, candidates, **kwargs):
    return score_caches(model, text, DynamicCache(config=model.config), candidates, **kwargs)


def test_against_log_probs_worked_out_by_hand(tiny_model, text):
    cache = TurboQuantCache(tiny_model.config, "tq2")
    scores = score(tiny_model, text, {"tq2": cache}, chunk_size=20)
    with torch.inference_mode():
        expected = tiny_model(text).logits[0].double().log_softmax(-1)
        again = TurboQuantCache(tiny_model.config, "tq2")
        steps = [text[:, :20], *text[:, 20:].split(1, dim=1)]
        actual = torch.cat([tiny_model(step, past_key_values=again).logits[0] for step in steps]).double()
        actual = actual.log_softmax(-1)
    scored = slice(20, 89)
    kl = (expected.exp() * (expected - actual)).sum(-1)[scored]
    torch.testing.assert_close(scores["tq2"].kl, kl, rtol=1e-3, atol=1e-6)
    assert scores["tq2"].num_tokens == 69
    assert torch.equal(scores["tq2"].agrees, (expected.argmax(-1) == actual.argmax(-1))[scored])
    nll = -actual[scored].gather(-1, text[0, 21:, None]).mean()
    assert scores["tq2"].perplexity == pytest.approx(float(nll.exp()), rel=1e-4)


def test_the_reference_agrees_with_itself(tiny_model, text):
    scores = score(tiny_model, text, {"same": DynamicCache(config=tiny_model.config)}, chunk_size=20)
    for name in ("reference", "same"):
        assert scores[name].mean_kl == pytest.approx(0, abs=1e-9)
        assert scores[name].top1_agreement == 1


def test_fewer_bits_diverge_more_and_all_caches_hold_the_text(tiny_model, text):
    caches = {bits: TurboQuantCache(tiny_model.config, key_bits=bits, value_bits=bits) for bits in (8, 4, 3, 2)}
    scores = score(tiny_model, text, caches, chunk_size=32)
    divergences = [scores[bits].mean_kl for bits in caches]
    assert divergences == sorted(divergences)
    assert divergences[0] > 0
    assert {cache.get_seq_length() for cache in caches.values()} == {90}


def test_every_forward_is_announced(tiny_model, text):
    calls = []
    cache = TurboQuantCache(tiny_model.config)
    score(tiny_model, text, {"tq4": cache}, chunk_size=20, on_forward=lambda: calls.append(1))
    assert len(calls) == 2 * 5


@pytest.mark.parametrize("shape", [(1, 20), (2, 90)])
def test_texts_that_read_no_cache_are_refused(tiny_model, shape):
    with pytest.raises(ValueError, match="longer than a chunk of 20 tokens"):
        score(tiny_model, torch.zeros(shape, dtype=torch.int64), {}, chunk_size=20)


def test_the_reference_name_is_taken(tiny_model, text):
    with pytest.raises(ValueError, match="'reference'"):
        score(tiny_model, text, {"reference": TurboQuantCache(tiny_model.config)}, chunk_size=20)
