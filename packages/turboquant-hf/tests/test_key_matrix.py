"""A codec whose keys go through a matrix: attention is the same, and a file keeps it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from turboquant_core.key_transform import KeyTransform
from turboquant_hf import TurboQuantCache
from turboquant_hf.storage.codec import LayerCodec


@pytest.fixture(scope="module", params=["sdpa", "turboquant"], ids=["dequantising", "fused"])
def model(request, tiny_model, sharpened):
    model = sharpened(tiny_model)
    model.set_attn_implementation(request.param)
    return model


@pytest.fixture
def with_matrix(monkeypatch):
    """Every codec from now on has a matrix of each head."""
    calibrate = LayerCodec.calibrate

    def changed(config, keys, *arguments):
        codec = calibrate(config, keys, *arguments)
        heads, size = keys.shape[1:]
        noise = torch.randn(heads, size, size, generator=torch.Generator().manual_seed(0))
        matrix = 1.5 * torch.eye(size) + noise / (2 * size**0.5)
        return replace(codec, key_transform=KeyTransform(codec.key_transform.mean, matrix))

    return lambda: monkeypatch.setattr(LayerCodec, "calibrate", changed)


def prefilled(model, prompt):
    cache = TurboQuantCache(model.config, key_bits=8, value_bits=8, sink_tokens=2, recent_tokens=5)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    return cache


def test_attention_sees_keys_as_they_were(model, prompt, with_matrix, next_logits):
    expected = next_logits(model, prompt, prefilled(model, prompt))
    with_matrix()
    cache = prefilled(model, prompt)
    assert cache.layers[0].store.pages.codec.key_transform.matrix is not None
    found = next_logits(model, prompt, cache)
    assert not torch.equal(found, expected)
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_a_file_keeps_the_matrix(model, prompt, with_matrix, tmp_path, next_logits):
    with_matrix()
    cache = prefilled(model, prompt)
    cache.save(tmp_path / "prefix.safetensors")
    assert load_file(tmp_path / "prefix.safetensors")["layers.0.key_matrix"].shape == (4, 64, 64)
    loaded = TurboQuantCache.load(tmp_path / "prefix.safetensors", model.config)
    assert loaded.nbytes == cache.nbytes
    assert torch.equal(next_logits(model, prompt, loaded), next_logits(model, prompt, cache))
