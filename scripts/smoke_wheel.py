"""Use one freshly installed package the way its users start: core, hf or vllm."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, files, version
from pathlib import Path

import torch


def check_core() -> None:
    """Quantise and restore vectors, and ask the command for its version."""
    from turboquant_core import MSEQuantizer

    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    quantizer = MSEQuantizer(128, 4)
    restored = quantizer.dequantize(quantizer.quantize(x))
    error = float((restored - x).square().sum() / x.square().sum())
    require(error < 0.02, f"4 bits leave {error:.1%} of the energy as error, not under 2%")
    output = command_output("--version")
    require(version("turboquant-core") in output, f"turboquant --version prints {output!r}")


def check_hf() -> None:
    """Import the package, find its data and the demo's help."""
    import turboquant_hf  # noqa: F401

    installed = [Path(str(path.locate())) for path in files("turboquant-hf") or []]
    data = [path for path in installed if is_data(path)]
    require(bool(data), "turboquant-hf brings no data files")
    missing = [str(path) for path in data if not path.is_file() or not path.stat().st_size]
    require(not missing, f"turboquant-hf lacks {missing}")
    require("Usage" in command_output("demo", "--help"), "turboquant demo --help prints no usage")


def check_vllm() -> None:
    """Import the package, and find the plugin that vLLM would load, which needs vLLM itself."""
    import turboquant_vllm

    plugins = entry_points(group="vllm.general_plugins", name="turboquant")
    require([plugin.load() for plugin in plugins] == [turboquant_vllm.register], "vLLM would not find the plugin")
    try:
        turboquant_vllm.register()
    except ModuleNotFoundError as error:
        require(error.name == "vllm", f"turboquant_vllm.register() lacks {error.name}")
        return
    raise RuntimeError("turboquant_vllm.register() needs no vLLM")


def is_data(path: Path) -> bool:
    """Whether an installed file is package data."""
    return "turboquant_hf" in path.parts and path.suffix not in {".py", ".pyc"} and path.name != "py.typed"


def command_output(*arguments: str) -> str:
    """What the installed `turboquant` prints."""
    command = [str(Path(sys.executable).with_name("turboquant")), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def require(condition: bool, problem: str) -> None:
    """Stop with a message unless a condition holds."""
    if not condition:
        raise RuntimeError(problem)


CHECKS: dict[str, Callable[[], None]] = {"core": check_core, "hf": check_hf, "vllm": check_vllm}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
