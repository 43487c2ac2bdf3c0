"""What a path is: one way to run an operation, and what it takes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from turboquant_core._checks import MAX_BITS, MIN_BITS
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops._dispatch import has_gluon, interpreting

ALL_BITS = tuple(range(MIN_BITS, MAX_BITS + 1))
GLUON_CARDS = {"ampere": "sm_80", "hopper": "sm_90"}
"""Generations of cards that Gluon has modules for, and what it calls them elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Path:
    """One way to run an operation beside its reference, and what it takes.

    Attributes:
        name: What calls of the operation name it by.
        head_dims: Sizes of heads; None for all.
        key_bits: Bits of a key coordinate.
        value_bits: The same for values.
        splits_keys: Whether it takes keys that are split.
        block_size_multiple: What pages have a multiple of tokens of.
        capability: The oldest NVIDIA card; None for every card that Triton compiles for, of NVIDIA or not.
        newest_capability: The newest one; None for all that come.
        gluon: The generation of cards that Gluon is needed for, such as "ampere"; None for plain Triton, which its
            interpreter runs too.
    """

    name: str
    head_dims: tuple[int, ...] | None = None
    key_bits: tuple[int, ...] = ALL_BITS
    value_bits: tuple[int, ...] = ALL_BITS
    splits_keys: bool = False
    block_size_multiple: int = 1
    capability: tuple[int, int] | None = None
    newest_capability: tuple[int, int] | None = None
    gluon: str | None = None

    def layout_obstacle(self, layout: KVCacheLayout) -> str | None:
        """Why it cannot run for a layout; None if it can."""
        config = layout.config
        for name, found, taken in (
            ("head_dim", config.head_dim, self.head_dims),
            ("key_bits", config.key_bits, self.key_bits),
            ("value_bits", config.value_bits, self.value_bits),
        ):
            if taken is not None and found not in taken:
                return f"{name} is {found}, and it takes {', '.join(map(str, taken))}"
        if config.key_split and not self.splits_keys:
            return "keys are split, and it takes keys of one width"
        if layout.block_size % self.block_size_multiple:
            return f"block_size is {layout.block_size}, and it takes multiples of {self.block_size_multiple}"
        return None

    def card_obstacle(self, layout: KVCacheLayout, capability: tuple[int, int]) -> str | None:
        """Why it cannot run for a layout on NVIDIA cards of a compute capability; None if it can."""
        if self.capability is not None:
            newest = capability if self.newest_capability is None else self.newest_capability
            if not self.capability <= capability <= newest:
                found, needed = ("sm_{}{}".format(*version) for version in (capability, self.capability))
                return f"the card is {found}, and it needs {needed}"
        return self.layout_obstacle(layout)

    def device_obstacle(self, layout: KVCacheLayout, device: torch.device) -> str | None:
        """Why it cannot run for a layout on a device; None if it can."""
        if interpreting():
            return "Gluon has no interpreter" if self.gluon is not None else self.layout_obstacle(layout)
        if device.type != "cuda":
            return f"the tensors are on {device.type}, and kernels need CUDA"
        if torch.version.hip is not None:
            return self.layout_obstacle(layout) if self.capability is None else "its instructions are NVIDIA's"
        if reason := self.card_obstacle(layout, torch.cuda.get_device_capability(device)):
            return reason
        if self.gluon is not None and not has_gluon(self.gluon):
            return f"this Triton has no Gluon for {GLUON_CARDS[self.gluon]}; 3.6 has"
        return None


P = TypeVar("P", bound=Path)


def find_path(name: str, paths: Sequence[P]) -> P | None:
    """The path of that name; None for "auto" and "reference".

    Raises:
        ValueError: If there is none.
    """
    names = ["auto", *(path.name for path in paths), "reference"]
    if name not in names:
        raise ValueError(f"path is {name!r}; it must be one of {', '.join(names)}")
    return next((path for path in paths if path.name == name), None)


def choose(
    name: str, paths: Sequence[P], fastest_first: Iterable[P], device: torch.device, obstacle: Callable[[P], str | None]
) -> P | None:
    """The path that a name means: itself, or for "auto" the fastest that can run; None for the reference.

    Args:
        name: "auto", "reference" or a path's.
        paths: All that there are.
        fastest_first: What "auto" takes the first of that can run, on CUDA; the last one takes everything.
        device: Where the tensors are.
        obstacle: Why a path cannot run for a call; None if it can.

    Raises:
        ValueError: If there is no such path or it cannot run there; the message says why.
    """
    path = find_path(name, paths)
    if path is not None:
        if reason := obstacle(path):
            raise ValueError(f"path is {path.name!r}, which cannot run here: {reason}. Use path='auto'.")
        return path
    if name == "reference" or device.type != "cuda":
        return None
    return next(path for path in fastest_first if obstacle(path) is None)
