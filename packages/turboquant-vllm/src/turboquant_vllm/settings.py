"""What a user may say about the cache: `--additional-config '{"turboquant": {...}}'`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import SequenceMatcher
from typing import Any

from turboquant_core import TurboQuantConfig
from turboquant_core._checks import check_int
from turboquant_core.config import PRESETS, WHOLE_BITS, preset_bits
from turboquant_core.raw_copies import CopyColumns
from turboquant_core.vector_format import can_split
from turboquant_vllm._compat.engine import current_config
from turboquant_vllm.artifacts import orders_every_layer

KEY = "turboquant"
# How alike a name with a slip is at least: with a letter missing, or two swapped, it has 0.9.
_NEAR = 0.8
# Those of whole bits, which the kernels read.
SERVED_PRESETS = tuple(name for name, bits in PRESETS.items() if all(count == int(count) for count in bits))


@dataclass(frozen=True)
class Settings:
    """Settings of all layers.

    Attributes:
        preset: Bits of keys and values: "tq4", "tq3", "tq2", "k6v4" or "k8v4".
        key_bits: Instead of the preset's: 2, 3, 4, 5, 6 or 8.
        value_bits: The same for values.
        center_keys: Subtract a mean per layer, KV head and channel before keys are quantised.
        calibration: A file by `turboquant calibrate` of those means, and of scale and order of channels, by which keys
            of 2, 3 or 4 bits are split; None to take means from texts that ship.
        layer_bits: A file of the bits of every layer by `turboquant tune`, instead of a preset.
        sink_tokens: First tokens of a request that are attended to raw, from copies beside the pages.
        recent_tokens: Newest tokens that are, each token's own included.
    """

    preset: str = "tq4"
    key_bits: int | None = None
    value_bits: int | None = None
    center_keys: bool = True
    calibration: str | None = None
    layer_bits: str | None = None
    sink_tokens: int = 1
    recent_tokens: int = 16

    def __post_init__(self) -> None:
        for name in ("key_bits", "value_bits"):
            if (given := getattr(self, name)) is not None:
                check_int(name, given, WHOLE_BITS[0], WHOLE_BITS[-1], "The kernels read codes of whole bits.")
        # Checks both.
        CopyColumns(self.sink_tokens, self.recent_tokens)
        # A head_dim that every format takes: the rest is refused here, before weights are loaded.
        config = self._whole_config(head_dim=128)
        for name in ("key_bits", "value_bits"):
            bits = getattr(config, name)
            if bits != int(bits):
                raise ValueError(
                    f"{self.preset} stores {bits} bits, which the kernels do not read. "
                    f"Use a preset of whole bits: {', '.join(SERVED_PRESETS)}."
                )
        for name in ("calibration", "layer_bits"):
            path = getattr(self, name)
            if path is not None and (not isinstance(path, str) or not path):
                raise ValueError(f"{name} is {path!r}; it must be the path of a file")
        if self.calibration is not None and not self.center_keys:
            raise ValueError(
                f"center_keys is false and calibration is {self.calibration!r}, a file of means for centring; "
                "give one of them"
            )

    @property
    def reads_first_codes(self) -> bool:
        """Whether the first token is read as codes, which is unlike all others: a calibration has two parts for it."""
        return self.sink_tokens == 0

    @property
    def keeps_copies(self) -> bool:
        """Whether any token is attended to raw."""
        return self.sink_tokens > 0 or self.recent_tokens > 0

    def cache_config(self, head_dim: int, layer_bits: tuple[float, float] | None = None) -> TurboQuantConfig:
        """What is stored for one head, of a layer that has bits of its own or of any other.

        Raises:
            FileNotFoundError: If there is no such calibration.
            ValueError: If it is damaged.
        """
        config = self._whole_config(head_dim, layer_bits)
        if self.calibration is None or not can_split(head_dim, config.key_bits):
            return config
        # Pages are of one size: either the channels of all layers are ordered, or keys are not split.
        return replace(config, key_split=orders_every_layer(self.calibration, codes_only=self.reads_first_codes))

    def _whole_config(self, head_dim: int, layer_bits: tuple[float, float] | None = None) -> TurboQuantConfig:
        if layer_bits is not None:
            return TurboQuantConfig(head_dim, *layer_bits, center_keys=self.center_keys)
        key_bits, value_bits = preset_bits(self.preset)
        return TurboQuantConfig(
            head_dim,
            key_bits if self.key_bits is None else self.key_bits,
            value_bits if self.value_bits is None else self.value_bits,
            center_keys=self.center_keys,
        )

    @classmethod
    def of_engine(cls, config: Any) -> "Settings":
        """The settings in the configuration of an engine of vLLM."""
        return cls.of(config.additional_config, config.cache_config.cache_dtype)

    @classmethod
    def of(cls, additional_config: Any, kv_cache_dtype: str = "auto") -> "Settings":
        """The settings in vLLM's additional configuration, or of a preset given as `--kv-cache-dtype`.

        Raises:
            ValueError: If a name or a value is unknown, or bits are given twice.
        """
        if isinstance(additional_config, str | bytes):
            right = json.dumps({KEY: {"preset": "tq4"}})
            raise ValueError(
                f"additional_config is the text {additional_config!r:.100}; give an object such as {right}"
            )
        additional_config = additional_config if isinstance(additional_config, Mapping) else {}
        for name, value in additional_config.items():
            if name != KEY and _means_key(name):
                raise ValueError(f"additional_config has {name!r}, which nothing reads; write {KEY!r}")
            if _is_setting(name, value):
                right = json.dumps({KEY: {name: value.lower() if name == "preset" else value}}, default=repr)
                raise ValueError(f"additional_config has {name!r}, which nothing reads there; write {right}")
        chosen = additional_config.get(KEY, {})
        if not isinstance(chosen, Mapping):
            raise ValueError(f'{KEY} is {chosen!r}; it must be an object such as {{"preset": "tq4"}}')
        known = [field.name for field in fields(cls)]
        for name in chosen:
            if name not in known:
                raise ValueError(f"{KEY} has {name!r}; it may have {', '.join(known)}")
        if kv_cache_dtype in SERVED_PRESETS:
            if chosen.get("preset", kv_cache_dtype) != kv_cache_dtype:
                raise ValueError(
                    f"kv_cache_dtype is {kv_cache_dtype} and {KEY} has preset {chosen['preset']!r}; give one of them"
                )
            chosen = {**chosen, "preset": kv_cache_dtype}
        for name in ("preset", "key_bits", "value_bits"):
            if chosen.get("layer_bits") is not None and chosen.get(name) is not None:
                raise ValueError(
                    f"{name} is {chosen[name]} and layer_bits is {chosen['layer_bits']!r}, a file of bits; give one of "
                    "them"
                )
        return cls(**chosen)


_latest: Settings = Settings()


def process_settings() -> Settings:
    """The settings of the engine in whose context this is called, or of the latest one of this process.

    vLLM asks for the page size after the layers are built, not always in the context of their configuration.
    """
    global _latest
    config = current_config()
    if config is not None:
        _latest = Settings.of_engine(config)
    return _latest


def _means_key(name: object) -> bool:
    """Whether a name in the additional configuration, which others' settings share, is ours with a slip in it."""
    letters = "".join(filter(str.isalpha, str(name).lower()))
    return letters.startswith(KEY) or SequenceMatcher(None, letters, KEY).ratio() > _NEAR


def _is_setting(name: object, value: object) -> bool:
    """Whether an entry of the additional configuration is a setting of ours in the wrong place, and not another's."""
    if name == "preset":
        return isinstance(value, str) and value.lower() in PRESETS
    if name == "calibration":
        return isinstance(value, str) and value.endswith(".safetensors")
    return name in ("key_bits", "value_bits", "center_keys", "layer_bits", "sink_tokens", "recent_tokens")
