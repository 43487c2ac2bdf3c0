"""What an engine is refused with at its start, before it serves anything."""

import re

import pytest

import processes
import refuse

REFUSED = {
    "unknown preset": ({"preset": "tq9"}, {}, "preset is 'tq9'; it must be one of tq4"),
    "unknown setting": ({"presets": "tq4"}, {}, "turboquant has 'presets'; it may have preset"),
    "conflict": ({"calibration": "m", "center_keys": False}, {}, "center_keys is false and calibration is 'm'"),
    "no file": ({"calibration": "none.safetensors"}, {}, "no file none.safetensors.*turboquant calibrate MODEL --out"),
    "connector": (
        {},
        {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
        "turboquant calibrate MODEL --out FILE` and give it to both sides",
    ),
    "head_dim": (
        {},
        {"hf_overrides": {"head_dim": 72}},
        "head_size is 72; TurboQuant serves 64, 80.*Leave --attention",
    ),
    "block_size": ({}, {"block_size": 40}, "block_size is 40; TurboQuant takes multiples of 16"),
    # On some CPUs vLLM 0.33 refuses this one itself.
    "type of the cache": (
        {},
        {"kv_cache_dtype": "fp8"},
        "kv_cache_dtype is fp8; TurboQuant takes auto|fp8 is not supp",
    ),
    "no bits": ({"layer_bits": "none.json"}, {}, "no file none.json.*turboquant tune MODEL"),
}


@pytest.fixture(scope="module")
def refusals(tiny_model, tmp_path_factory):
    """What each was refused with; one process tries them all."""
    model = str(tiny_model("Llama"))
    asked = [
        {"model": model, "attention_backend": "CUSTOM", "additional_config": {"turboquant": settings}, **options}
        for settings, options, _ in REFUSED.values()
    ]
    log = tmp_path_factory.mktemp("refusals") / "log.txt"
    refused = processes.call(refuse.refusals, asked, log, {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    return dict(zip(REFUSED, refused, strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_the_value_and_a_remedy(refusals, case):
    assert re.search(REFUSED[case][-1], refusals[case]), refusals[case]
