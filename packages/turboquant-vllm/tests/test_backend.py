import sys
from types import SimpleNamespace

import pytest
import torch
from vllm.platforms.interface import DeviceCapability

from turboquant_core.vllm_limits import HEAD_DIMS
from turboquant_vllm import backend
from turboquant_vllm._compat.interface import AttentionBackend, AttentionType, FullAttentionSpec, SlidingWindowSpec
from turboquant_vllm.backend import TurboQuantBackend
from turboquant_vllm.builder import AttentionCGSupport, TurboQuantMetadataBuilder
from turboquant_vllm.settings import Settings


def spec(kind=FullAttentionSpec, **fields):
    return kind(
        **{"block_size": 16, "num_kv_heads": 8, "head_size": 128, "head_size_v": 128, "dtype": torch.bfloat16, **fields}
    )


def test_a_page_holds_codes_and_scales_and_nothing_else():
    page = TurboQuantBackend.customize_spec(spec())
    assert page.dtype == torch.uint8
    assert page.page_size_bytes == 16 * 8 * 132
    assert spec().page_size_bytes / page.page_size_bytes > 3.87


def test_the_page_may_be_asked_for_twice():
    once = TurboQuantBackend.customize_spec(spec())
    assert TurboQuantBackend.customize_spec(once) == once


def test_windowed_layers_have_pages_of_the_same_size():
    window = TurboQuantBackend.customize_spec(spec(SlidingWindowSpec, sliding_window=100))
    assert window.page_size_bytes == TurboQuantBackend.customize_spec(spec()).page_size_bytes


def test_keys_and_values_of_unequal_sizes_are_refused():
    with pytest.raises(ValueError, match="head_size 128 and values 64"):
        TurboQuantBackend.customize_spec(spec(head_size_v=64))


@pytest.mark.parametrize("kind", ["RSWASpec", "ChunkedLocalAttentionSpec", "SinkFullAttentionSpec"])
def test_other_kinds_of_layers_are_refused(kind):
    own = {"RSWASpec": {"rswa_window": 64}, "ChunkedLocalAttentionSpec": {"attention_chunk_size": 64}}
    own["SinkFullAttentionSpec"] = {"sink_len": 4}
    specs = sys.modules[FullAttentionSpec.__module__]
    with pytest.raises(ValueError, match=f"{kind} is not supported by TurboQuant"):
        TurboQuantBackend.customize_spec(spec(getattr(specs, kind), **own[kind]))


def test_layers_that_see_later_tokens_are_refused():
    with pytest.raises(ValueError, match="non-causal attention is not supported"):
        TurboQuantBackend.customize_spec(spec(non_causal=True))


ANSWERS = {
    "supports_sink": True,
    "supports_sliding_window": True,
    "supports_alibi_sqrt": False,
    "supports_batch_invariance": False,
    "supports_dcp": False,
    "supports_device_cpu_query_lens_mismatch": False,
    "supports_kv_cache_update_bypass": False,
    "supports_mm_prefix": False,
    "supports_non_causal": False,
    "supports_non_causal_dcp": False,
    "supports_pcp": False,
    "supports_per_head_quant_scales": False,
    "supports_rswa": False,
    "is_mla": False,
    "is_sparse": False,
    "is_ssm": False,
}
# These take an argument, or depend on the engine, and have tests of their own.
OTHER_ANSWERS = {
    "supports_attn_type",
    "supports_block_size",
    "supports_combination",
    "supports_compute_capability",
    "supports_dtype",
    "supports_head_size",
    "supports_kv_cache_dtype",
    "supports_kv_connector",
}


def test_what_vllm_asks_is_answered_truthfully():
    asked = {name for name in dir(AttentionBackend) if name.startswith(("supports_", "is_"))}
    # A newer vLLM may ask more: what is left to its default has to be looked at.
    assert asked <= ANSWERS.keys() | OTHER_ANSWERS
    for name in asked & ANSWERS.keys():
        answer = getattr(TurboQuantBackend, name)
        assert (answer() if callable(answer) else answer) is ANSWERS[name], name


def test_shapes_and_types_are_answered_truthfully():
    assert all(TurboQuantBackend.supports_head_size(size) for size in HEAD_DIMS)
    assert not TurboQuantBackend.supports_head_size(72)
    assert all(TurboQuantBackend.supports_kv_cache_dtype(name) for name in ("auto", "bfloat16", "tq4", None))
    assert not TurboQuantBackend.supports_kv_cache_dtype("fp8")
    assert TurboQuantBackend.supports_block_size(48)
    assert not TurboQuantBackend.supports_block_size(8)
    assert TurboQuantBackend.supports_dtype(torch.bfloat16)
    assert not TurboQuantBackend.supports_dtype(torch.float64)
    assert TurboQuantBackend.supports_attn_type(AttentionType.DECODER)
    for kind in (AttentionType.ENCODER, AttentionType.ENCODER_ONLY, AttentionType.ENCODER_DECODER):
        assert not TurboQuantBackend.supports_attn_type(kind)
    assert TurboQuantBackend.supports_compute_capability(DeviceCapability(8, 0))
    assert not TurboQuantBackend.supports_compute_capability(DeviceCapability(7, 5))


@pytest.mark.parametrize(
    ("settings", "supported"),
    [(Settings(), False), (Settings(calibration="means.safetensors"), True), (Settings(center_keys=False), True)],
)
def test_pages_may_leave_a_process_whose_means_others_know(monkeypatch, settings, supported):
    monkeypatch.setattr(backend, "process_settings", lambda: settings)
    assert TurboQuantBackend.supports_kv_connector() is supported


@pytest.mark.parametrize(
    ("num_drafted", "is_parallel", "fits"),
    [(None, False, True), (15, False, True), (16, False, False), (7, True, True), (8, True, False)],
)
def test_graphs_hold_drafts_that_decode_attention_takes(num_drafted, is_parallel, fits):
    # Where drafts are parallel, vLLM reorders rows of twice as many tokens as decoding: longer ones would be prefills.
    draft = SimpleNamespace(num_speculative_tokens=num_drafted, parallel_drafting=is_parallel)
    support = TurboQuantMetadataBuilder.get_cudagraph_support(SimpleNamespace(speculative_config=draft), None)
    one_token = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    assert support is (AttentionCGSupport.UNIFORM_BATCH if fits else one_token)
