"""What to store: the policy that a cache is built from."""

from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

from turboquant_core._checks import check_bool, check_head_dim
from turboquant_core.key_transform import KeyTransform
from turboquant_core.scale import ScaleRule, check_scale_rule
from turboquant_core.vector_format import OUTLIER_BITS, VectorFormat, can_split

WHOLE_BITS = (2, 3, 4, 5, 6, 8)
CACHE_BITS = tuple(sorted([*WHOLE_BITS, *OUTLIER_BITS]))

PRESETS = MappingProxyType(
    {
        "tq4": (4, 4),
        "tq3.5": (3.5, 3.5),
        "tq3": (3, 3),
        "tq2.5": (2.5, 2.5),
        "tq2": (2, 2),
        "k6v4": (6, 4),
        "k8v4": (8, 4),
    }
)
"""Preset name to (key_bits, value_bits)."""


@dataclass(frozen=True)
class TurboQuantConfig:
    """How the keys and values of one head are stored.

    Args:
        head_dim: Dimension of keys, and of values if these have none of their own; a multiple of 8 from 8 to 512.
        key_bits: Bits per key coordinate: 2, 2.5, 3, 3.5, 4, 5, 6 or 8.
        value_bits: The same for values.
        key_scale: Stored scale of keys: "norm", "unbiased" or "least_squares". Unbiased keys cost a third less KL than
            plain norms on real weights, at no bytes.
        value_scale: The same for values.
        center_keys: Subtract a fixed per-channel mean before keys are quantised. Softmax does not see it, and models
            with large key biases need it.
        key_split: Whether the first half of a key's channels gets one bit more than `key_bits`, and the second one
            less; at 2, 3 and 4 bits. It pays where channels come in the order of what an error in them costs, and takes
            two bytes a key.
        value_head_dim: Dimension of values where it is another, as in models with latent attention, which are stored so
            and have no kernels; None for that of keys.
    """

    head_dim: int
    key_bits: float = 4
    value_bits: float = 4
    key_scale: ScaleRule = "unbiased"
    value_scale: ScaleRule = "least_squares"
    center_keys: bool = True
    key_split: bool = False
    value_head_dim: int | None = None

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)
        if self.value_head_dim is not None:
            check_head_dim(self.value_head_dim, "value_head_dim")
            if self.value_head_dim == self.head_dim:
                # What is stored alike is equal.
                object.__setattr__(self, "value_head_dim", None)
        check_bool("key_split", self.key_split)
        for name in ("key_bits", "value_bits"):
            check_cache_bits(name, getattr(self, name))
        self.key_format, self.value_format  # noqa: B018
        check_scale_rule(self.key_scale)
        check_scale_rule(self.value_scale)
        check_bool("center_keys", self.center_keys)

    @classmethod
    def preset(cls, name: str, head_dim: int, **overrides: Any) -> "TurboQuantConfig":
        """The named preset for a head_dim, with fields replaced by keyword.

        Raises:
            ValueError: If there is no such preset.
        """
        key_bits, value_bits = preset_bits(name)
        return cls(head_dim, **{"key_bits": key_bits, "value_bits": value_bits, **overrides})

    def fitted_to(self, key_transform: KeyTransform) -> "TurboQuantConfig":
        """The same, with keys split if their channels are ordered by what an error costs, and can be split."""
        split = key_transform.order is not None and can_split(self.head_dim, self.key_bits)
        return replace(self, key_split=split)

    @cached_property
    def head_dims(self) -> tuple[int, int]:
        """Dimension of keys, and of values."""
        return self.head_dim, self.value_head_dim or self.head_dim

    @cached_property
    def key_format(self) -> VectorFormat:
        """The bytes of one stored key."""
        return VectorFormat(self.head_dim, self.key_bits, self.key_split)

    @cached_property
    def value_format(self) -> VectorFormat:
        """The bytes of one stored value."""
        return VectorFormat(self.head_dims[1], self.value_bits)

    @cached_property
    def has_kernels(self) -> bool:
        """Whether operations on pages take it: bits are whole, and keys and values of one head_dim."""
        return self.value_head_dim is None and not {self.key_bits, self.value_bits} & OUTLIER_BITS.keys()

    @cached_property
    def slot_bytes(self) -> int:
        """Bytes of one token's key and value for one KV head."""
        return self.key_format.nbytes + self.value_format.nbytes


def preset_bits(name: str) -> tuple[float, float]:
    """(key_bits, value_bits) of a preset.

    Raises:
        ValueError: If there is no such preset.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset is {name!r}; it must be one of {', '.join(PRESETS)}")
    return PRESETS[name]


def check_cache_bits(name: str, bits: float) -> None:
    """Raise ValueError when no cache stores that many bits."""
    if bits not in CACHE_BITS:
        known = ", ".join(str(known) for known in CACHE_BITS)
        raise ValueError(f"{name} is {bits!r}; it must be one of {known}")
