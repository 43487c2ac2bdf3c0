"""What figures depend on beside settings, and that a run file therefore keeps: the text, the machine, the model."""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from turboquant_core.command_output import CommandError
from turboquant_hf.tools.models import LoadedModel

PACKAGES = ("torch", "transformers", "turboquant-core", "turboquant-hf", "optimum-quanto", "hqq")

FINGERPRINT_WEIGHTS = 8


def text_digest(text: str) -> str:
    """The digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(path: Path) -> str:
    """The digest of a file.

    Raises:
        CommandError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error}") from error


def environment(device: str) -> dict[str, Any]:
    """The machine and the versions that figures come from."""
    kind = torch.device(device).type
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else f"{kind}, {platform.machine()}",
        **({"threads": torch.get_num_threads()} if kind == "cpu" else {}),
        **{package: installed for package in PACKAGES if (installed := _version(package)) is not None},
    }


def model_identity(loaded: LoadedModel) -> dict[str, Any]:
    """What tells one model from another: its name, type, configuration, and a few of every tensor's weights."""
    digest = hashlib.sha256(loaded.model.config.to_json_string().encode())
    for name, weights in loaded.model.named_parameters():
        first = weights.detach().reshape(-1)[:FINGERPRINT_WEIGHTS].float().cpu()
        digest.update(f"{name} {tuple(weights.shape)}".encode() + first.numpy().tobytes())
    return {
        "name": loaded.name,
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "fingerprint": digest.hexdigest(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
