import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import vllm
from packaging.requirements import Requirement
from packaging.version import Version
from vllm.config import cache

import turboquant_vllm
from turboquant_vllm._compat import versions
from turboquant_vllm._compat.interface import current_platform
from turboquant_vllm._compat.registry import AttentionBackendEnum
from turboquant_vllm.settings import SERVED_PRESETS


def dependencies():
    return tomllib.loads(Path(__file__).parents[1].joinpath("pyproject.toml").read_text())["project"]["dependencies"]


def test_vllm_finds_the_plugin_and_may_load_it_twice():
    (plugin,) = entry_points(group="vllm.general_plugins", name="turboquant")
    for _ in range(2):
        plugin.load()()
    backend = AttentionBackendEnum.CUSTOM.get_class()
    assert backend.__module__ == "turboquant_vllm.backend"
    assert AttentionBackendEnum[backend.get_name()] is AttentionBackendEnum.CUSTOM


@pytest.mark.skipif(not current_platform.is_cpu(), reason="the slot of CPUs")
def test_on_a_cpu_nothing_changes_unless_the_backend_is_asked_for():
    turboquant_vllm.register()
    assert AttentionBackendEnum.CPU_ATTN.get_class().get_name() == "CPU_ATTN"


@pytest.mark.parametrize("version", ["0.28.0", "0.28.1.dev3", "0.19"])
def test_an_older_vllm_is_refused(monkeypatch, version):
    monkeypatch.setattr(vllm, "__version__", version)
    with pytest.raises(RuntimeError, match=f"needs vLLM 0.29.0 or newer.*this is {version}"):
        versions.check_version()


def test_an_untried_vllm_is_warned_of(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    with pytest.warns(UserWarning, match=r"tested with vLLM .*this is 0.99.0"):
        versions.check_version()


def test_metadata_asks_for_the_versions_of_vllm_that_were_tried_and_no_newer_one():
    (asked,) = (found for line in dependencies() if (found := Requirement(line)).name == "vllm")
    newest = Version(versions.TESTED[-1])
    for version in (str(versions.OLDEST), *(f"{tested}.5" for tested in versions.TESTED)):
        assert version in asked.specifier
    for version in ("0.28.1", f"{newest.major}.{newest.minor + 1}.0"):
        assert version not in asked.specifier


def test_metadata_asks_for_a_bounded_core():
    assert any(line.startswith("turboquant-core") and "<" in line for line in dependencies())


@pytest.mark.skipif(not hasattr(cache, "register_kv_cache_dtype"), reason="vLLM before 0.33 has no such hook")
def test_presets_are_types_of_the_cache():
    for _ in range(2):
        turboquant_vllm.register()
    assert [cache.KV_CACHE_DTYPES.count(preset) for preset in SERVED_PRESETS] == [1] * len(SERVED_PRESETS)
