import pytest
import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from turboquant_vllm.backend import TurboQuantBackend
from turboquant_vllm.support import HEAD_SIZES, check_layer


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


def test_what_vllm_asks_is_answered_truthfully():
    backend = TurboQuantBackend
    assert all(backend.supports_head_size(size) for size in HEAD_SIZES)
    assert not backend.supports_head_size(72)
    assert backend.supports_sliding_window()
    assert backend.supports_sink()
    assert backend.supports_kv_cache_dtype("auto")
    assert not backend.supports_kv_cache_dtype("fp8")
    assert backend.supports_block_size(48)
    assert not backend.supports_block_size(8)
    assert not backend.supports_mm_prefix()
    assert not backend.supports_non_causal()
    assert not backend.supports_batch_invariance()
    assert not backend.is_mla()
    assert not backend.supports_attn_type(AttentionType.ENCODER_ONLY)
    # Another process would read keys less a mean that it does not know.
    assert not backend.supports_kv_connector()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_size": 72}, "head_size is 72; TurboQuant serves 64, 80"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8; TurboQuant takes auto"),
        ({"attn_type": "encoder_only"}, "attn_type is encoder_only"),
        ({"alibi_slopes": [1.0]}, "ALiBi is not supported"),
        ({"kv_sharing_target_layer_name": "layers.3"}, "shares the cache of layers.3"),
        ({"extra": {"chunk_lookback": 3}}, "chunk_lookback=3"),
        ({"engine_kv_cache_dtype": "tq4"}, "kv_cache_dtype auto among layers of tq4"),
    ],
)
def test_a_layer_that_would_be_wrong_is_refused(fields, message):
    fine = {
        "head_size": 128,
        "kv_cache_dtype": "auto",
        "attn_type": "decoder",
        "alibi_slopes": None,
        "kv_sharing_target_layer_name": None,
        "engine_kv_cache_dtype": "auto",
        "extra": {"chunk_lookback": -1},
    }
    check_layer(**fine)
    with pytest.raises(ValueError, match=message):
        check_layer(**fine | fields)
