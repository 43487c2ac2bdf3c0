"""The caches that can be compared, by name."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import QuantizedCache

from turboquant_core import PRESETS
from turboquant_core.command_output import REFUSED, CommandError
from turboquant_hf._compat import HAS_FP8_CACHE, Cache, DynamicCache, PreTrainedConfig
from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.support import layer_attention

WINDOW = 128
"""Newest tokens that QuantizedCache keeps as they are before it quantises them: its default `residual_length`."""

UNCOMPRESSED = "uncompressed"
TURBOQUANT = "turboquant"

NewCache = Callable[..., Cache]
"""Makes an empty cache for a model's configuration; ours take options of `TurboQuantCache` too."""


@dataclass(frozen=True)
class NamedCache:
    """A cache that can be evaluated.

    Attributes:
        name: How it is asked for.
        family: Whose it is: "uncompressed", "turboquant", "quanto", "hqq" or "fp8".
        made_with: What it is made with, for the reader.
        new: Makes an empty one.
        package: The distribution that it needs.
        module: The module by which that is found.
    """

    name: str
    family: str
    made_with: str
    new: NewCache
    package: str | None = None
    module: str = ""

    def calibrated(self, config: PreTrainedConfig, calibration: Path | None) -> Cache:
        """An empty cache for a model, if it is ours with the file of `turboquant calibrate`, where there is one."""
        return self.new(config, key_transforms=calibration) if self.is_ours and calibration else self.new(config)

    @property
    def is_ours(self) -> bool:
        """Whether it stores TurboQuant codes."""
        return self.family == TURBOQUANT

    @property
    def is_peer(self) -> bool:
        """Whether another project quantises."""
        return self.family not in (UNCOMPRESSED, TURBOQUANT)

    @property
    def missing(self) -> str | None:
        """What has to be installed before it can be made."""
        if self.family == "fp8":
            return None if HAS_FP8_CACHE else "transformers 5.21 or newer"
        if self.package is None or (find_spec(self.module.partition(".")[0]) and find_spec(self.module)):
            return None
        return f"the package {self.package}"


def _ours(preset: str) -> NamedCache:
    def new(config: PreTrainedConfig, **options: Any) -> Cache:
        return TurboQuantCache(config, preset, **options)

    return NamedCache(preset, TURBOQUANT, f"preset {preset}", new)


def quantized_cache(backend: str, nbits: int, axis_key: int, axis_value: int) -> NewCache:
    """Makes caches of transformers, in groups of 64 numbers and with a window of `WINDOW` tokens."""
    return lambda config: QuantizedCache(
        backend, config, nbits=nbits, axis_key=axis_key, axis_value=axis_value, q_group_size=64, residual_length=WINDOW
    )


def _quantized(name: str, backend: str, bits: int, axis_key: int, axis_value: int, made_with: str) -> NamedCache:
    package, module = {"quanto": ("optimum-quanto", "optimum.quanto"), "hqq": ("hqq", "hqq")}[backend]
    new = quantized_cache(backend, bits, axis_key, axis_value)
    return NamedCache(name, backend, f"{made_with}; window of {WINDOW} tokens", new, package, module)


def _all() -> list[NamedCache]:
    channels = "groups of 64 channels"
    return [
        NamedCache(UNCOMPRESSED, UNCOMPRESSED, "DynamicCache", lambda config: DynamicCache(config=config)),
        *(_ours(preset) for preset in PRESETS),
        *(_quantized(f"quanto{bits}", "quanto", bits, 0, 0, f"axis 0, {channels}") for bits in (4, 2)),
        *(_quantized(f"hqq{bits}", "hqq", bits, 1, 1, f"axis 1, {channels}") for bits in (8, 4, 2, 1)),
        NamedCache("fp8", "fp8", "e4m3, one scale for a layer", lambda config: QuantizedCache("fp8", config)),
    ]


CACHES = MappingProxyType({cache.name: cache for cache in _all()})
"""Name to cache, peers at the settings that the documentation of transformers recommends for them."""

DEFAULT_CACHES = ("k8v4", "k6v4", "tq4", "tq3", "tq2", "fp8", "quanto4", "quanto2", "hqq4", "hqq2")


def find_cache(name: str) -> NamedCache:
    """The cache of a name.

    Raises:
        ValueError: If there is none, or what it needs is not installed.
    """
    if name not in CACHES:
        raise ValueError(f"there is no cache {name!r}; there are {', '.join(CACHES)}")
    cache = CACHES[name]
    if cache.missing:
        raise ValueError(f"the cache {name} needs {cache.missing}, which is not installed here")
    return cache


def check_heads(config: PreTrainedConfig, command: str, remedy: str) -> None:
    """Refuse a model for a command that knows keys and values of one size, as attention reads them.

    Raises:
        CommandError: If a layer stores others.
    """
    for layer in layer_attention(config):
        if layer.is_compressed and not layer.has_one_head_dim:
            raise CommandError(
                f"layer {layer.index} of this {config.model_type} model ({layer.describe()}) stores keys of "
                f"{layer.head_dim} channels and values of {layer.value_head_dim}, and {command} takes one size. "
                f"{remedy}",
                REFUSED,
                "refused",
            )


def compressed_layers(config: PreTrainedConfig) -> frozenset[int]:
    """Indices of the layers that `TurboQuantCache` compresses."""
    layers = TurboQuantCache(config).layers
    return frozenset(index for index, layer in enumerate(layers) if isinstance(layer, TurboQuantLayer))
