"""Bits of every layer, in a JSON file: `turboquant tune` writes it, turboquant-hf and turboquant-vllm load it."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turboquant_core.config import check_cache_bits
from turboquant_core.files import check_format, read_json, reading, write_atomically
from turboquant_core.model_identity import ModelIdentity

FORMAT = "turboquant-layer-bits"
FORMAT_VERSION = 1

_KEYS = ("format", "format_version", "model", "source", "measured", "layer_bits")
_LAYER_INDEX = re.compile(r"0|[1-9][0-9]{0,5}")
_REMEDY = "Write it again with `turboquant tune MODEL --target-bits BITS --out FILE`."


@dataclass(frozen=True)
class LayerBits:
    """The bits of every attention layer of a model.

    Attributes:
        layer_bits: Layer index in the text model to (key_bits, value_bits), for every layer whose cache is compressed.
        model: The model whose layers they are.
        source: What that model was called when they were chosen: a hub id or a path. Informs only.
        measured: What these bits gave when they were chosen, as plain JSON data. Informs only.
    """

    layer_bits: Mapping[int, tuple[float, float]]
    model: ModelIdentity
    source: str
    measured: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.layer_bits:
            raise ValueError("there is no layer with bits")
        for layer_index, (key_bits, value_bits) in self.layer_bits.items():
            if not 0 <= layer_index < self.model.num_layers:
                raise ValueError(f"there are bits for layer {layer_index} of a model of {self.model.num_layers} layers")
            check_cache_bits(f"key_bits of layer {layer_index}", key_bits)
            check_cache_bits(f"value_bits of layer {layer_index}", value_bits)

    def of_layer(self, layer_index: int) -> tuple[float, float]:
        """(key_bits, value_bits) of one layer.

        Raises:
            ValueError: If the file says nothing of that layer.
        """
        if layer_index not in self.layer_bits:
            raise ValueError(f"the bits of {self.source} have none for layer {layer_index}. {_REMEDY}")
        return self.layer_bits[layer_index]


def write_layer_bits(path: str | os.PathLike[str], bits: LayerBits) -> None:
    """Write bits to a JSON file; a file that is there is replaced once the new one is complete."""
    data = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "model": bits.model.to_dict(),
        "source": bits.source,
        "measured": dict(bits.measured),
        "layer_bits": {str(index): list(pair) for index, pair in sorted(bits.layer_bits.items())},
    }
    write_atomically(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_layer_bits(path: str | os.PathLike[str], model: ModelIdentity | None = None) -> LayerBits:
    """Read bits from a JSON file.

    Args:
        path: A file that `write_layer_bits` wrote.
        model: The model that they are for.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, something else, or belongs to another model.
    """
    path = Path(path)
    with reading(path, "bits of layers", _REMEDY):
        bits = _parse(read_json(path))
    bits.model.check_is(model, f"{path} holds the bits of {bits.source:.200}", _REMEDY)
    return bits


def _parse(data: object) -> LayerBits:
    data = data if isinstance(data, dict) else {}
    check_format(data, FORMAT, FORMAT_VERSION)
    if data.keys() != set(_KEYS):
        different = ", ".join(sorted(data.keys() ^ set(_KEYS)))
        raise ValueError(f"its keys must be {', '.join(_KEYS)}; what is missing or too many: {different}")
    for name, kind in (("source", str), ("measured", dict), ("layer_bits", dict)):
        if not isinstance(data[name], kind):
            raise ValueError(f"{name} is {data[name]!r}")
    return LayerBits(
        layer_bits={_index(index): _pair(index, bits) for index, bits in data["layer_bits"].items()},
        model=ModelIdentity.from_dict(data["model"]),
        source=data["source"],
        measured=data["measured"],
    )


def _index(text: str) -> int:
    if _LAYER_INDEX.fullmatch(text) is None:
        raise ValueError(f"there are bits for a layer {text!r}; layers are numbered from 0")
    return int(text)


def _pair(index: str, bits: Any) -> tuple[float, float]:
    is_pair = isinstance(bits, list) and len(bits) == 2
    if not is_pair or not all(type(number) in (int, float) for number in bits):
        raise ValueError(f"the bits of layer {index} are {bits!r}; they must be [key_bits, value_bits]")
    key_bits, value_bits = bits
    return key_bits, value_bits
