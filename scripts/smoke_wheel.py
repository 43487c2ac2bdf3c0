"""Use one freshly installed package the way its users start: core, hf, hf[tools] or vllm."""

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, files, version
from pathlib import Path

import torch


def check_core() -> None:
    """Quantise and restore vectors, and ask for the command, which needs the extra."""
    from turboquant_core import MSEQuantizer

    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    quantizer = MSEQuantizer(128, 4)
    restored = quantizer.dequantize(quantizer.quantize(x))
    error = float((restored - x).square().sum() / x.square().sum())
    require(error < 0.02, f"4 bits leave {error:.1%} of the energy as error, not under 2%")
    require_extra("--version")


def check_hf() -> None:
    """Generate from a cache with a small model, and ask for a command, which needs the extra."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from turboquant_hf import TurboQuantCache

    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=100, eos_token_id=None, **sizes)
    cache = TurboQuantCache(config)
    prompt = torch.arange(20)[None]
    output = LlamaForCausalLM(config).generate(
        prompt, attention_mask=torch.ones_like(prompt), past_key_values=cache, max_new_tokens=4, pad_token_id=0
    )
    require(output.shape == (1, 24), f"generating gave {list(output.shape)} tokens")
    require("turboquant 4/4 bits" in cache.memory_report().table(), f"the cache reports {cache.memory_report()}")
    require_extra("doctor", "no-model")


def check_tools() -> None:
    """Find the commands' data, the version and the demo's help."""
    output = command("--version").stdout
    require(version("turboquant-core") in output, f"turboquant --version prints {output!r}")
    installed = [Path(str(path.locate())) for path in files("turboquant-hf") or []]
    data = [path for path in installed if is_data(path)]
    require(bool(data), "turboquant-hf brings no data files")
    missing = [str(path) for path in data if not path.is_file() or not path.stat().st_size]
    require(not missing, f"turboquant-hf lacks {missing}")
    require("Usage" in command("demo", "--help").stdout, "turboquant demo --help prints no usage")


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


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What the installed `turboquant` does."""
    installed = str(Path(sys.executable).with_name("turboquant"))
    return subprocess.run([installed, *arguments], capture_output=True, text=True, check=False)


def require_extra(*arguments: str) -> None:
    """Stop unless `turboquant` says which extra it needs, in one line."""
    ended = command(*arguments)
    said = ended.stderr.splitlines()
    is_named = len(said) == 1 and "./packages/turboquant-hf[tools]" in said[0]
    require(is_named and ended.returncode == 2, f"without the extra turboquant ends with {ended}")


def require(condition: bool, problem: str) -> None:
    """Stop with a message unless a condition holds."""
    if not condition:
        raise RuntimeError(problem)


CHECKS: dict[str, Callable[[], None]] = {
    "core": check_core,
    "hf": check_hf,
    "hf[tools]": check_tools,
    "vllm": check_vllm,
}

if __name__ == "__main__":
    CHECKS[sys.argv[1]]()
