"""The caches that are compared, each at the settings that its own documentation recommends."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from transformers import Cache, DynamicCache, PreTrainedConfig, QuantizedCache

from turboquant_hf import TurboQuantCache
from turboquant_hf.tools.caches import WINDOW, NewCache, quantized_cache

RECENT_TOKENS = 32


@dataclass(frozen=True)
class Family:
    """Caches of one kind.

    Attributes:
        settings: What they are called with, for the reader.
        caches: Name to constructor.
        is_calibrated: Whether the constructors are to be given a calibration file of the model as `key_transforms`.
    """

    settings: str
    caches: Mapping[str, NewCache]
    is_calibrated: bool = False


def reference(config: PreTrainedConfig) -> Cache:
    """The uncompressed cache."""
    return DynamicCache(config=config)


def _ours(key_bits: int, value_bits: int, **kept: Any) -> NewCache:
    return partial(TurboQuantCache, key_bits=key_bits, value_bits=value_bits, **kept)


FAMILIES = MappingProxyType(
    {
        "turboquant": Family(
            "the defaults: keys centred, the first token and the newest 8 in full precision",
            {f"turboquant {bits}": _ours(bits, bits) for bits in (4, 3, 2)} | {"turboquant k6v4": _ours(6, 4)},
        ),
        "turboquant, calibrated": Family(
            "the same with the file of `turboquant calibrate`: keys split",
            {
                f"turboquant {name}, calibrated": _ours(*bits)
                for name, bits in {"4": (4, 4), "k3v4": (3, 4), "3": (3, 3), "2": (2, 2)}.items()
            },
            is_calibrated=True,
        ),
        f"turboquant, {RECENT_TOKENS} recent tokens": Family(
            f"recent_tokens={RECENT_TOKENS}: about as many bytes as the caches below take at the same bits",
            {
                f"turboquant {bits}, {RECENT_TOKENS} recent": _ours(bits, bits, recent_tokens=RECENT_TOKENS)
                for bits in (4, 2)
            },
        ),
        "turboquant, codes only": Family(
            "sink_tokens=0, recent_tokens=0",
            {
                f"turboquant {name}, codes only": _ours(*bits, sink_tokens=0, recent_tokens=0)
                for name, bits in {
                    **{str(bits): (bits, bits) for bits in (8, 6, 4, 3, 2)},
                    "k8v4": (8, 4),
                    "k6v4": (6, 4),
                }.items()
            },
        ),
        "quanto": Family(
            f"the defaults: axis 0, groups of 64 channels, window of {WINDOW} tokens",
            {f"quanto {bits}": quantized_cache("quanto", bits, 0, 0) for bits in (4, 2)},
        ),
        "quanto, keys by channel": Family(
            f"axis_key=-1: keys in groups of 64 tokens of a channel, as in KIVI; window of {WINDOW} tokens",
            {f"quanto {bits}, keys by channel": quantized_cache("quanto", bits, -1, 0) for bits in (4, 2)},
        ),
        "hqq": Family(
            f"axis 1, as recommended for it: groups of 64 channels; window of {WINDOW} tokens",
            {f"hqq {bits}": quantized_cache("hqq", bits, 1, 1) for bits in (8, 4, 3, 2, 1)},
        ),
        "hqq, keys by channel": Family(
            f"axis_key=0: keys in groups of 64 numbers of a channel, over tokens and heads; window of {WINDOW} tokens",
            {f"hqq {bits}, keys by channel": quantized_cache("hqq", bits, 0, 1) for bits in (4, 2, 1)},
        ),
        "fp8": Family(
            "has no settings: e4m3, one scale for a layer, no window",
            {"fp8": lambda config: QuantizedCache("fp8", config)},
        ),
    }
)
