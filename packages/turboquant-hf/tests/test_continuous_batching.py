"""`generate_batch` of transformers makes a paged cache of its own: these tests notice when it can be given another."""

import inspect
from dataclasses import fields

import pytest
from transformers import ContinuousBatchingConfig, GenerationConfig

from turboquant_hf.attention.dispatch import ATTENTION

# What would open it is a cache, or allocators of single kinds of layers, that a caller may name.
NAMED = ("cache", "allocator", "quant")


def test_nothing_names_the_cache_that_it_uses(tiny_model):
    settings = {field.name for field in fields(ContinuousBatchingConfig)} - {"max_cached_graphs"}
    arguments = set(inspect.signature(tiny_model.generate_batch).parameters)
    assert not [name for name in settings | arguments if any(part in name for part in NAMED)]


def test_attention_on_codes_is_refused_by_name(tiny_model):
    tiny_model.set_attn_implementation(ATTENTION)
    try:
        with pytest.raises(ValueError, match=f'{ATTENTION}["`]* is not supported'):
            tiny_model.generate_batch([[1, 2, 3]], GenerationConfig(max_new_tokens=2, do_sample=False))
    finally:
        tiny_model.set_attn_implementation("sdpa")
