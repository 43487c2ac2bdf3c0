"""What an evaluation measures, and by how much."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from turboquant_hf.tools.eval.command import MEASUREMENTS

EVAL = "turboquant eval"

MAX_ITEMS = 1000
"""Most caches, lengths or depths of a run."""


@dataclass(frozen=True)
class EvalSettings:
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
        calibration_sha256: Digest of the calibration file that our caches are made with; None without one.
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
    calibration_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        data = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        # As it was before there was the setting.
        return {key: value for key, value in data.items() if value is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "EvalSettings":
        """The settings that `to_dict` wrote.

        Raises:
            ValueError: If a field is missing, unknown, of another type, or nothing that can be measured.
        """
        data = {"calibration_sha256": None, **data}
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
        digests = (settings.text_sha256, settings.calibration_sha256 or "")
        if not all(isinstance(name, str) for name in (*settings.caches, *settings.measurements, *digests)):
            raise ValueError("a name is no text")
        if unknown := [name for name in settings.measurements if name not in MEASUREMENTS]:
            raise ValueError(f"there is no measurement {unknown[0]!r}")
        return settings
