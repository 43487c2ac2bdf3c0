"""The caches that are compared, each at the settings that its own documentation recommends."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache

from side_by_side.windowed import windowed_cache
from turboquant_hf import TurboQuantCache

WINDOW = 128
"""Newest tokens that QuantizedCache keeps as they are before it quantises them: its default `residual_length`."""

NewCache = Callable[[PreTrainedConfig], Cache]


@dataclass(frozen=True)
class Family:
    """Caches of one kind.

    Attributes:
        settings: What they are called with, for the reader.
        caches: Name to constructor.
        is_trial: Whether they are made for this comparison alone, with no lifecycle to speak of.
    """

    settings: str
    caches: Mapping[str, NewCache]
    is_trial: bool = False


REFERENCE = "DynamicCache"


def reference(config: PreTrainedConfig) -> Cache:
    """The uncompressed cache."""
    return DynamicCache(config=config)


def _ours(key_bits: int, value_bits: int) -> NewCache:
    return lambda config: TurboQuantCache(config, key_bits=key_bits, value_bits=value_bits)


def _quantized(backend: str, nbits: int, axis_key: int, axis_value: int) -> NewCache:
    return lambda config: QuantizedCache(
        backend, config, nbits=nbits, axis_key=axis_key, axis_value=axis_value, q_group_size=64, residual_length=WINDOW
    )


def _windowed(bits: int, sinks: int) -> NewCache:
    return lambda config: windowed_cache(config, WINDOW, sinks, bits)


FAMILIES = MappingProxyType(
    {
        "turboquant": Family(
            "the defaults: keys centred, no window",
            {f"turboquant {bits}": _ours(bits, bits) for bits in (8, 6, 4, 3, 2)}
            | {"turboquant k8v4": _ours(8, 4), "turboquant k6v4": _ours(6, 4)},
        ),
        "turboquant, windowed": Family(
            f"a trial: keys centred, window of {WINDOW} tokens as the caches below have",
            {f"turboquant {bits}, windowed": _windowed(bits, sinks=0) for bits in (4, 3, 2)},
            is_trial=True,
        ),
        "turboquant, windowed, first token kept": Family(
            "a trial: the same, and the first token stays as it is",
            {f"turboquant {bits}, windowed, first token kept": _windowed(bits, sinks=1) for bits in (4, 3, 2)},
            is_trial=True,
        ),
        "quanto": Family(
            f"the defaults: axis 0, groups of 64 channels, window of {WINDOW} tokens",
            {f"quanto {bits}": _quantized("quanto", bits, 0, 0) for bits in (4, 2)},
        ),
        "quanto, keys by channel": Family(
            f"axis_key=-1: keys in groups of 64 tokens of a channel, as in KIVI; window of {WINDOW} tokens",
            {f"quanto {bits}, keys by channel": _quantized("quanto", bits, -1, 0) for bits in (4, 2)},
        ),
        "hqq": Family(
            f"axis 1, as recommended for it: groups of 64 channels; window of {WINDOW} tokens",
            {f"hqq {bits}": _quantized("hqq", bits, 1, 1) for bits in (8, 4, 3, 2, 1)},
        ),
        "fp8": Family(
            "has no settings: e4m3, one scale for a layer, no window",
            {"fp8": lambda config: QuantizedCache("fp8", config)},
        ),
    }
)
