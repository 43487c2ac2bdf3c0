import re
from types import SimpleNamespace

import pytest
from vllm.config import KVTransferConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from turboquant_vllm._compat.registry import AttentionBackendEnum
from turboquant_vllm.backend import TurboQuantBackend
from turboquant_vllm.refusals import check_layer, engine_problems
from turboquant_vllm.settings import Settings


@pytest.fixture(scope="module")
def configure():
    """Makes vLLM's configuration of an engine."""

    def make(model, **options):
        arguments = EngineArgs(str(model), skip_tokenizer_init=True, dtype="float32", max_model_len=256, **options)
        return arguments.create_engine_config()

    return make


@pytest.fixture
def config(configure, tiny_model):
    return configure(tiny_model("Llama"))


CONNECTOR = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")


def draft(**fields):
    """What --speculative-config was given."""
    plain = {
        "method": "eagle",
        "attention_backend": None,
        "enable_adaptive_verification": False,
        "parallel_drafting": False,
    }
    return SimpleNamespace(**plain | fields)


COMPRESSED = {"attention_backend": AttentionBackendEnum.CUSTOM}


def test_an_engine_like_most_is_served(config):
    assert engine_problems(config, Settings()) == []
    assert engine_problems(None, Settings()) == []


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("parallel_config", "decode_context_parallel_size", 2, "decode_context_parallel_size is 2.*serves 1"),
        ("parallel_config", "prefill_context_parallel_size", 4, "prefill_context_parallel_size is 4.*serves 1"),
        ("cache_config", "kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill is set.*Leave"),
        ("attention_config", "use_non_causal", True, "use_non_causal is set"),
        (
            None,
            "speculative_config",
            draft(enable_adaptive_verification=True),
            "adaptive verification is not supported",
        ),
        (None, "kv_transfer_config", CONNECTOR, "the pages that ExampleConnector hands.*turboquant calibrate MODEL"),
    ],
)
def test_what_is_not_served_is_named_with_a_remedy(config, monkeypatch, part, name, value, message):
    monkeypatch.setattr(getattr(config, part) if part else config, name, value)
    (problem,) = engine_problems(config, Settings())
    assert re.search(message, problem)
    # vLLM asks so on a GPU, and repeats the answer.
    with set_current_vllm_config(config):
        assert TurboQuantBackend.supports_combination(128, None, None, 16, False, False, False, False, None) == problem


def test_a_block_size_is_refused_only_where_it_was_asked_for(configure, tiny_model):
    (problem,) = engine_problems(configure(tiny_model("Llama"), block_size=40), Settings())
    assert re.search("block_size is 40; TurboQuant takes multiples of 16", problem)
    assert engine_problems(configure(tiny_model("Llama"), block_size=48), Settings()) == []


def test_batch_invariance_is_refused(config, monkeypatch):
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    (problem,) = engine_problems(config, Settings())
    assert problem == "TurboQuant's results vary with the batch by rounding. Unset VLLM_BATCH_INVARIANT."


def test_bidirectional_images_are_refused_and_text_alone_is_served(configure, tiny_vision_model):
    both_ways = {"hf_overrides": {"is_mm_prefix_lm": True}}
    (problem,) = engine_problems(configure(tiny_vision_model, **both_ways), Settings())
    assert re.search("in idefics3 the tokens of an image see.*--language-model-only", problem)
    assert engine_problems(configure(tiny_vision_model, **both_ways, language_model_only=True), Settings()) == []
    assert engine_problems(configure(tiny_vision_model), Settings()) == []


def test_reference_sliding_windows_are_refused(configure, tiny_model):
    config = configure(tiny_model("Llama"), hf_overrides={"rswa_window": 64})
    (problem,) = engine_problems(config, Settings())
    assert re.search("rswa_window=64", problem)


@pytest.mark.parametrize("settings", [Settings(calibration="means.safetensors"), Settings(center_keys=False)])
def test_a_connector_is_served_where_the_means_are_known_elsewhere(config, monkeypatch, settings):
    monkeypatch.setattr(config, "kv_transfer_config", CONNECTOR)
    assert engine_problems(config, settings) == []


def offloading(connector="OffloadingConnector", **extra):
    return KVTransferConfig(kv_connector=connector, kv_role="kv_both", kv_connector_extra_config=extra)


@pytest.mark.parametrize(
    ("transfer", "served"),
    [
        (offloading(cpu_bytes_to_use=2**30), True),
        (offloading(spec_name="CPUOffloadingSpec"), True),
        (offloading(spec_name="TieringOffloadingSpec"), False),
        (offloading("SimpleCPUOffloadConnector"), True),
        (offloading("SimpleCPUOffloadConnector", kv_offload_backend="disk", disk_path="/pages"), False),
        (offloading("MultiConnector"), False),
    ],
)
def test_pages_that_come_back_to_their_process_need_no_file(config, monkeypatch, transfer, served):
    monkeypatch.setattr(config, "kv_transfer_config", transfer)
    assert (engine_problems(config, Settings()) == []) is served
    with set_current_vllm_config(config):
        assert TurboQuantBackend.supports_kv_connector() is served


INNER = {"connectors": [{"kv_connector": "ExampleConnector"}, {"kv_connector": "LMCacheConnectorV1"}]}


@pytest.mark.parametrize("transfer", [offloading("LMCacheConnectorV1"), offloading("MultiConnector", **INNER)])
def test_a_connector_that_takes_slots_for_uncompressed_is_refused(config, monkeypatch, transfer):
    settings = Settings(center_keys=False)
    monkeypatch.setattr(config, "kv_transfer_config", transfer)
    (problem,) = engine_problems(config, settings)
    assert re.search("kv_connector is LMCacheConnectorV1, which copies slots.*LMCacheMPConnector instead", problem)
    monkeypatch.setattr(config, "kv_transfer_config", offloading("LMCacheMPConnector"))
    assert engine_problems(config, settings) == []


def test_offloading_by_its_own_flag_needs_no_file(configure, tiny_model):
    config = configure(tiny_model("Llama"), kv_offloading_size=1)
    assert config.kv_transfer_config.kv_connector == "OffloadingConnector"
    assert engine_problems(config, Settings()) == []


@pytest.mark.parametrize("fields", [{}, {"method": "draft_model"}, COMPRESSED])
def test_drafts_are_served_by_vllms_own_backend_or_by_ours(config, monkeypatch, fields):
    monkeypatch.setattr(config, "speculative_config", draft(**fields))
    assert engine_problems(config, Settings()) == []


@pytest.mark.parametrize("fields", [{"method": "draft_model"}, {"method": "dflash", "parallel_drafting": True}])
def test_drafts_whose_lengths_vllm_does_not_know_are_not_compressed(config, monkeypatch, fields):
    monkeypatch.setattr(config, "speculative_config", draft(**COMPRESSED, **fields))
    (problem,) = engine_problems(config, Settings())
    assert re.search(f"of method {fields['method']} is not served.*Leave attention_backend out", problem)


def test_a_draft_has_no_means_in_the_file(config, monkeypatch):
    monkeypatch.setattr(config, "speculative_config", draft(**COMPRESSED))
    (problem,) = engine_problems(config, Settings(calibration="means.safetensors"))
    assert re.search(
        "calibration is means.safetensors, which holds no means of the draft.*attention_backend out", problem
    )


def test_a_draft_and_a_connector_are_not_served_with_a_file_of_bits(config, monkeypatch):
    settings = Settings(layer_bits="bits.json", calibration="means.safetensors")
    assert engine_problems(config, settings) == []
    monkeypatch.setattr(config, "kv_transfer_config", CONNECTOR)
    (problem,) = engine_problems(config, settings)
    assert re.search("layer_bits is bits.json, and ExampleConnector was not tried.*Leave one of them out", problem)
    monkeypatch.setattr(config, "kv_transfer_config", None)
    monkeypatch.setattr(config, "speculative_config", draft(**COMPRESSED))
    assert "which holds no bits of the draft model" in engine_problems(config, settings)[-1]


def test_stages_that_may_have_no_compressed_layer_need_a_file(config, monkeypatch):
    monkeypatch.setattr(config.cache_config, "kv_cache_dtype_skip_layers", ["0", "1"])
    monkeypatch.setattr(config.parallel_config, "pipeline_parallel_size", 2)
    (problem,) = engine_problems(config, Settings())
    assert re.search("pipeline_parallel_size is above 1 and.*turboquant calibrate MODEL.*center_keys", problem)
    for settings in (Settings(calibration="means.safetensors"), Settings(center_keys=False)):
        assert engine_problems(config, settings) == []


def test_microbatches_that_overlap_cannot_share_raw_copies(config, monkeypatch):
    monkeypatch.setattr(config.parallel_config, "enable_dbo", True)
    for settings in (Settings(), Settings(sink_tokens=0), Settings(recent_tokens=0)):
        (problem,) = engine_problems(config, settings)
        assert re.search("microbatches.*--enable-dbo.*sink_tokens.*recent_tokens", problem)
    assert engine_problems(config, Settings(sink_tokens=0, recent_tokens=0)) == []


def test_a_connector_is_not_served_with_layers_that_stay_uncompressed(config, monkeypatch):
    monkeypatch.setattr(config.cache_config, "kv_cache_dtype_skip_layers", ["0", "3"])
    assert engine_problems(config, Settings()) == []
    monkeypatch.setattr(config, "kv_transfer_config", CONNECTOR)
    (problem,) = engine_problems(config, Settings(center_keys=False))
    assert re.search("skip_layers is 0, 3, and ExampleConnector was not tried.*Leave one of them out", problem)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_size": 72}, "head_size is 72; TurboQuant serves 64, 80"),
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype is fp8; TurboQuant takes auto"),
        ({"attn_type": "encoder_only"}, "attn_type is encoder_only"),
        ({"alibi_slopes": [1.0]}, "ALiBi is not supported"),
        ({"extra": {"chunk_lookback": 3}}, "chunk_lookback=3"),
    ],
)
def test_a_layer_that_would_be_wrong_is_refused(fields, message):
    fine = {
        "head_size": 128,
        "kv_cache_dtype": "auto",
        "attn_type": "decoder",
        "alibi_slopes": None,
        "extra": {"chunk_lookback": -1},
    }
    check_layer(**fine)
    with pytest.raises(ValueError, match=message):
        check_layer(**fine | fields)
