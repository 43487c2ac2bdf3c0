import re
from importlib.metadata import entry_points, requires

import pytest

import turboquant_vllm


def test_registering_says_what_is_missing_and_what_to_do():
    expected = re.escape(turboquant_vllm.__version__) + ".*no attention backend yet.*turboquant-hf"
    with pytest.raises(NotImplementedError, match=expected):
        turboquant_vllm.register()


def test_vllm_finds_no_plugin_of_ours_that_would_fail():
    plugins = entry_points(group="vllm.general_plugins")
    assert not [plugin for plugin in plugins if plugin.value.startswith("turboquant")]


def test_metadata_asks_for_vllm_and_a_bounded_core():
    required = requires("turboquant-vllm")
    assert any(line.startswith("vllm") for line in required)
    assert any(line.startswith("turboquant-core") and "<" in line for line in required)
