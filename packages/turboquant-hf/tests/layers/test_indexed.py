"""Models that choose by an indexer which tokens a token sees."""

import pytest
import torch
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM, DynamicCache
from transformers.cache_utils import DynamicIndexedLayer

from turboquant_hf import TurboQuantCache
from turboquant_hf._compat import with_cache
from turboquant_hf.attention.function import turboquant_attention
from turboquant_hf.layers.indexed import TurboQuantIndexedLayer
from turboquant_hf.memory import layer_tensors

EXACT = {"key_bits": 8, "value_bits": 8}


@pytest.fixture(scope="module")
def model(tiny_latent_config):
    torch.manual_seed(0)
    indexer = {"index_head_dim": 16, "index_n_heads": 2, "index_topk": 16}
    return DeepseekV32ForCausalLM(tiny_latent_config(DeepseekV32Config, **indexer)).eval()


def filled(num_tokens=20, batch_size=2):
    generator = torch.Generator().manual_seed(0)
    ours, theirs = TurboQuantIndexedLayer("tq4"), DynamicIndexedLayer()
    for tokens in (num_tokens - 1, 1):
        keys, values = torch.randn(2, batch_size, 1, tokens, 16, generator=generator)
        chosen = torch.randn(batch_size, tokens, 8, generator=generator)
        for layer in (ours, theirs):
            layer.update(keys, values)
            layer.update_indexer(chosen)
    positions = torch.arange(3 * batch_size * num_tokens).view(3, batch_size, num_tokens)
    for layer in (ours, theirs):
        layer.indexer_position_ids = positions
    return ours, theirs


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.crop(-7),
        lambda layer: layer.crop(0),
        lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
        lambda layer: layer.batch_repeat_interleave(3),
        lambda layer: layer.batch_select_indices(torch.tensor([1])),
        lambda layer: (layer.offload(), layer.prefetch()),
    ],
    ids=["crop", "crop nothing", "reorder", "repeat", "select", "offload"],
)
def test_the_indexers_keys_go_the_way_of_transformers_own(change):
    ours, theirs = filled()
    for layer in (ours, theirs):
        change(layer)
    assert torch.equal(ours.indexer_keys, theirs.indexer_keys)
    # transformers 5.16 knows of none.
    if "indexer_position_ids" in vars(DynamicIndexedLayer()):
        assert torch.equal(ours.indexer_position_ids, theirs.indexer_position_ids)
    assert ours.keys.shape == theirs.keys.shape


def test_reset_forgets_them():
    layer, _ = filled()
    assert any(tensor is layer.indexer_keys for tensor in layer_tensors(layer))
    layer.reset()
    assert layer.indexer_keys is None
    assert layer.indexer_position_ids is None
    assert layer_tensors(layer) == []


def test_keys_of_inference_mode_can_be_extended_outside():
    layer = TurboQuantIndexedLayer("tq4")
    with torch.inference_mode():
        layer.update(*torch.randn(2, 1, 1, 3, 16))
        layer.update_indexer(torch.randn(1, 3, 8))
    layer.update(*torch.randn(2, 1, 1, 2, 16))
    assert layer.update_indexer(torch.randn(1, 2, 8)).shape == (1, 5, 8)


@pytest.mark.parametrize(
    "options", [{"do_sample": False}, {"do_sample": False, "num_beams": 2}], ids=["greedy", "beams"]
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_model_generates(model, attention, options):
    model.set_attn_implementation(attention)
    prompt = torch.randint(1, 300, (2, 60), generator=torch.Generator().manual_seed(0))
    cache = TurboQuantCache(model.config, **EXACT)
    with torch.no_grad():
        text = model.generate(prompt, **with_cache(cache), max_new_tokens=10, **options)
        logits = [
            model(text[:, 60:64], **with_cache(each)).logits
            for each in (TurboQuantCache(model.config, **EXACT), DynamicCache(config=model.config))
            if model(text[:, :60], **with_cache(each)) is not None
        ]
    assert text.shape == (2, 70)
    # Noise may change a choice; without the choice it is 0.28.
    assert (logits[0] - logits[1]).norm() < 0.1 * logits[1].norm()


def test_attention_that_would_not_see_the_choice_is_refused(model):
    model.set_attn_implementation("turboquant")
    try:
        with pytest.raises(ValueError, match='Use attn_implementation="sdpa" or "eager" for it'), torch.no_grad():
            model(torch.ones(1, 4, dtype=torch.int64), **with_cache(TurboQuantCache(model.config)))
    finally:
        model.set_attn_implementation("sdpa")
    keys = torch.randn(1, 1, 4, 16)
    with pytest.raises(
        ValueError, match=r'takes a mask, and no tokens that an indexer chose\. Use attn_implementation="eager"'
    ):
        turboquant_attention(torch.nn.Module(), keys, keys, keys, None, indices=torch.zeros(1, 4, 1, dtype=torch.int32))


def test_what_is_not_done_is_refused_by_name(model, tmp_path):
    with pytest.raises(ValueError, match=r"StaticIndexedLayer, which TurboQuantCache does not know\. Leave max_length"):
        TurboQuantCache(model.config, max_length=64)
    cache = TurboQuantCache(model.config)
    with torch.no_grad():
        model(torch.ones(1, 4, dtype=torch.int64), **with_cache(cache))
    with pytest.raises(ValueError, match="layer 0 is a TurboQuantIndexedLayer; only caches of full-attention layers"):
        cache.save(tmp_path / "cache")
