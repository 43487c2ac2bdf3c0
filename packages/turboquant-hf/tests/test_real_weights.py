"""SmolLM2-135M over more than 2,000 tokens of prose: the figures that users are promised."""

import pytest
import torch
from transformers import DynamicCache

from turboquant_hf import TurboQuantCache
from turboquant_hf.scoring import CHUNK_SIZE, score_caches
from turboquant_hf.tools.article import article
from turboquant_hf.tools.models import DEFAULT_HUB_ID, EMBEDDED_PACKAGE, default_model

pytestmark = pytest.mark.real_weights

MAX_MEAN_KL = {"tq4": 0.012, "k6v4": 0.004}


def test_the_default_model_is_the_embedded_one_where_installed(smollm2):
    assert EMBEDDED_PACKAGE in default_model()
    assert smollm2.name.startswith("SmolLM2-135M-Instruct")


def test_the_default_model_is_a_hub_id_elsewhere(monkeypatch):
    monkeypatch.setattr("turboquant_hf.tools.models.find_spec", lambda name: None)
    assert default_model() == DEFAULT_HUB_ID


def test_kl_per_token(smollm2):
    model = smollm2.model
    input_ids = smollm2.tokenizer(article(), return_tensors="pt")["input_ids"][:, : 2050 + CHUNK_SIZE]
    caches = {preset: TurboQuantCache(model.config, preset) for preset in MAX_MEAN_KL}
    scores = score_caches(model, input_ids, DynamicCache(config=model.config), caches, chunk_size=CHUNK_SIZE)
    assert scores["reference"].num_tokens > 2000
    for preset, bound in MAX_MEAN_KL.items():
        assert scores[preset].mean_kl <= bound, preset
        assert scores[preset].mean_kl > 0, "the cache was not read"


def test_the_answer_survives(smollm2):
    ids = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    for preset in ("tq4", "tq3"):
        cache = TurboQuantCache(smollm2.model.config, preset)
        output = smollm2.model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=12, do_sample=False
        )
        assert "Paris" in smollm2.tokenizer.decode(output[0, ids.shape[1] :])
