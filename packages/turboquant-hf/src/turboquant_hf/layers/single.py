"""What an option gives single layers, by their indices or in a file."""

from collections.abc import Callable, Mapping, Sequence, Set
from os import PathLike
from typing import TypeVar

from turboquant_core._checks import is_int

_T = TypeVar("_T")


def of_layers(
    option: str,
    given: Mapping[int, _T] | str | PathLike[str],
    read: Callable[[str | PathLike[str]], Callable[[int], _T]],
    *,
    layers: Sequence[object],
    compressed: Set[int],
    skipped: Set[int],
    example: str,
    command: str,
) -> dict[int, _T]:
    """What an option gives layers, by index from zero.

    Args:
        option: Its name.
        given: Its value: a mapping, in which negative indices count from the last layer, or the path of a file.
        read: Reads a file, and gives what it says of a layer, or raises ValueError where it says nothing.
        layers: The layers of transformers.
        compressed: Those of a kind that is compressed.
        skipped: Those that keep full precision.
        example: What a layer may be given.
        command: The subcommand of `turboquant` that writes such files.

    Raises:
        ValueError: If the value is neither, or a layer is named that does not exist, is named twice or not compressed,
            or a file has none for one that is.
    """
    if isinstance(given, str | PathLike):
        of_layer = read(given)
        return {index: of_layer(index) for index in sorted(compressed - skipped)}
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{option} is {given!r}; write {{0: {example}}} for every layer that is meant, or the path of a file that "
            f"`turboquant {command}` wrote"
        )
    found: dict[int, _T] = {}
    for name, value in given.items():
        index = layer_index(name, len(layers), option)
        if index in found:
            raise ValueError(f"{option} names layer {index} twice, once as {name}; leave one of them out")
        if index in skipped:
            raise ValueError(f"layer {name} is in {option} and in skip_layers; leave it out of one of them")
        if index not in compressed:
            kind = type(layers[index]).__name__
            raise ValueError(f"{option} names layer {name}, a {kind}, which is not compressed; leave it out")
        found[index] = value
    return found


def layer_index(index: int, num_layers: int, option: str) -> int:
    """A layer's index from zero; negative ones count from the last."""
    if not is_int(index) or not -num_layers <= index < num_layers:
        raise ValueError(f"{option} names layer {index!r}; this model has {num_layers} layers with a cache")
    return index % num_layers
