from importlib.metadata import version
from importlib.resources import files

import pytest

import turboquant_core
from turboquant_core import testing

PUBLIC = {
    "PRESETS",
    "Codebook",
    "KVCacheLayout",
    "KeyTransform",
    "MSEQuantizer",
    "OutlierQuantizer",
    "ProdQuantizer",
    "QuantizedTensor",
    "Rotation",
    "TurboQuantConfig",
    "VectorFormat",
    "grid_codebook",
    "pack",
    "unpack",
}


def test_the_public_names_are_promises():
    assert set(turboquant_core.__all__) == PUBLIC


@pytest.mark.parametrize("module", [turboquant_core, testing], ids=lambda module: module.__name__)
def test_public_names_exist_once_and_are_documented(module):
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        value = getattr(module, name)
        if callable(value):
            assert value.__doc__, name


def test_the_version_is_the_distributions():
    assert turboquant_core.__version__ == version("turboquant-core")


def test_the_package_is_typed():
    assert files("turboquant_core").joinpath("py.typed").is_file()


def test_importing_the_package_loads_no_engine_and_no_command_line(run_python):
    loaded = run_python("import sys, turboquant_core; print(*sys.modules)").split()
    unwanted = {"transformers", "vllm", "triton", "typer", "rich", "matplotlib"}
    assert not unwanted & set(loaded)
    assert "turboquant_core.testing" not in loaded
