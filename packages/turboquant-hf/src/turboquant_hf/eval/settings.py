"""Everything that the figures of an evaluation depend on, and that a run file therefore keeps."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from turboquant_hf.models import LoadedModel

MEASUREMENTS = ("quality", "layers", "needle", "greedy", "speed")

PACKAGES = ("torch", "transformers", "turboquant-core", "turboquant-hf", "optimum-quanto", "hqq")

FINGERPRINT_WEIGHTS = 8

MAX_ITEMS = 1000
"""Most caches, lengths or depths of a run."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        caches: Names of caches; the uncompressed one is always measured beside them.
        measurements: Some of `MEASUREMENTS`.
        text_sha256: Digest of the text.
        num_tokens: Tokens of the text that are scored, the first chunk excepted.
        chunk_size: Tokens of a forward pass while scoring.
        layer_tokens: Tokens of the text by which layers are measured.
        needle_lengths: Tokens of the prompts with a needle.
        needle_depths: Depths at which it lies, 0 to 1.
        greedy_tokens: Tokens of a greedy continuation.
        seed: Picks the needles.
    """

    caches: tuple[str, ...]
    measurements: tuple[str, ...]
    text_sha256: str
    num_tokens: int
    chunk_size: int
    layer_tokens: int
    needle_lengths: tuple[int, ...]
    needle_depths: tuple[float, ...]
    greedy_tokens: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Settings":
        """The settings that `to_dict` wrote.

        Raises:
            ValueError: If a field is missing, unknown, of another type, or nothing that can be measured.
        """
        names = [field.name for field in fields(cls)]
        if sorted(data) != sorted(names):
            raise ValueError(f"settings are {', '.join(names)}")
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in data.items()
        }
        settings = cls(**values)
        lists = (settings.caches, settings.measurements, settings.needle_lengths, settings.needle_depths)
        if not all(isinstance(items, tuple) and len(items) <= MAX_ITEMS for items in lists):
            raise ValueError(f"a setting is no list of {MAX_ITEMS} at most")
        numbers = (settings.num_tokens, settings.chunk_size, settings.layer_tokens, settings.greedy_tokens)
        if not all(type(number) is int and number > 0 for number in (*numbers, *settings.needle_lengths)):
            raise ValueError("a setting is no number of tokens")
        if not all(isinstance(depth, int | float) and 0 <= depth <= 1 for depth in settings.needle_depths):
            raise ValueError("a depth is none from 0 to 1")
        if not all(isinstance(name, str) for name in (*settings.caches, *settings.measurements)):
            raise ValueError("a name is no text")
        if unknown := [name for name in settings.measurements if name not in MEASUREMENTS]:
            raise ValueError(f"there is no measurement {unknown[0]!r}")
        return settings


def text_digest(text: str) -> str:
    """The digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


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
