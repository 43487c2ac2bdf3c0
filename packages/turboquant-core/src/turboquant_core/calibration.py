"""What keys go through, taken beforehand, in a safetensors file: `turboquant calibrate` writes it, vLLM loads it."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from turboquant_core._checks import check_head_dim
from turboquant_core.files import check_format, open_safetensors, parse_json, reading, write_atomically
from turboquant_core.key_transform import PART_DTYPES, KeyTransform
from turboquant_core.model_identity import ModelIdentity

FORMAT = "turboquant-key-means"
FORMAT_VERSION = 2

LAYERS, CODES_ONLY = "layers", "codes_only"
_TENSOR_NAME = re.compile(rf"({LAYERS}|{CODES_ONLY})\.(0|[1-9][0-9]{{0,5}})\.(\w+)")
_REMEDY = "Write it again with `turboquant calibrate MODEL --out FILE`."


@dataclass(frozen=True, eq=False)
class Calibration:
    """What the keys of every attention layer go through after the rotary embedding.

    Attributes:
        layers: Layer index to transform, of tensors without rows; sizes may differ between layers. For caches that keep
            the first token as it is, whose key is far from all others.
        model: The model whose keys they are.
        source: What that model was called when they were taken: a hub id or a path. Informs only.
        num_tokens: Tokens that it was measured on.
        codes_only: The same as `layers` for caches that store all tokens as codes; None if it is the same.
    """

    layers: Mapping[int, KeyTransform]
    model: ModelIdentity
    source: str
    num_tokens: int
    codes_only: Mapping[int, KeyTransform] | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("there is no layer with a transform of keys")
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens is {self.num_tokens}; a calibration is measured on at least 1")
        if self.codes_only is not None and self.codes_only.keys() != self.layers.keys():
            raise ValueError(
                f"there are transforms for layers {list(self.layers)}, and where all tokens are codes for "
                f"{list(self.codes_only)}"
            )
        for layers in self._by_kind.values():
            for layer_index, transform in layers.items():
                _check_layer(layer_index, transform, self.model.num_layers)

    @property
    def _by_kind(self) -> dict[str, Mapping[int, KeyTransform]]:
        """The transforms by the names that they have in a file."""
        return {LAYERS: self.layers} | ({} if self.codes_only is None else {CODES_ONLY: self.codes_only})

    def for_cache(self, *, codes_only: bool) -> Mapping[int, KeyTransform]:
        """The transforms for a cache that stores all tokens as codes, or keeps the first as it is."""
        return self.codes_only if codes_only and self.codes_only is not None else self.layers

    def orders_every_layer(self, *, codes_only: bool) -> bool:
        """Whether the channels of all layers are ordered by what an error in them costs."""
        return all(transform.order is not None for transform in self.for_cache(codes_only=codes_only).values())

    def of_layer(self, layer_index: int, num_kv_heads: int, head_dim: int, *, codes_only: bool) -> KeyTransform:
        """The transform of one layer.

        Args:
            layer_index: Index of the layer in the text model.
            num_kv_heads: KV heads of the whole layer, not of one tensor-parallel rank.
            head_dim: Dimension of its keys.
            codes_only: Whether the cache stores all tokens as codes.

        Raises:
            ValueError: If there is none for the layer, or one of another shape.
        """
        transform = self.for_cache(codes_only=codes_only).get(layer_index)
        if transform is None:
            raise ValueError(f"the calibration of {self.source} has none for layer {layer_index}. {_REMEDY}")
        try:
            transform.check(num_kv_heads, head_dim)
        except ValueError as error:
            raise ValueError(f"layer {layer_index} of {self.source}: {error}. {_REMEDY}") from None
        return transform


def write_calibration(path: str | os.PathLike[str], calibration: Calibration) -> None:
    """Write a calibration to a safetensors file; a file that is there is replaced once the new one is complete."""
    tensors = {
        f"{kind}.{index}.{name}": tensor.cpu().clone(memory_format=torch.contiguous_format)
        for kind, layers in calibration._by_kind.items()
        for index, transform in layers.items()
        for name, tensor in transform.tensors().items()
    }
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "model": calibration.model.to_json(),
        "source": calibration.source,
        "num_tokens": str(calibration.num_tokens),
    }
    write_atomically(path, save(tensors, metadata))


def read_calibration(path: str | os.PathLike[str], model: ModelIdentity | None = None) -> Calibration:
    """Read a calibration from a safetensors file; nothing else is accepted, and nothing in it is executed.

    Args:
        path: A file that `write_calibration` wrote.
        model: The model that it is for.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, something else, or belongs to another model.
    """
    path = Path(path)
    with reading(path, "calibration", _REMEDY), open_safetensors(path) as file:
        metadata = file.metadata() or {}
        check_format(metadata, FORMAT, str(FORMAT_VERSION))
        if missing := [name for name in ("model", "source", "num_tokens") if name not in metadata]:
            raise ValueError(f"it lacks {', '.join(map(repr, missing))} in its metadata")
        kinds: dict[str, dict[int, dict[str, torch.Tensor]]] = {LAYERS: {}, CODES_ONLY: {}}
        for name in file.keys():  # noqa: SIM118 (no mapping)
            # Shapes come first: what cannot be such a tensor is not loaded.
            kind, layer_index, part = _check_stored(name, file.get_slice(name))
            kinds[kind].setdefault(layer_index, {})[part] = file.get_tensor(name)
        layers, codes_only = (
            {index: KeyTransform.from_tensors(tensors) for index, tensors in kinds[kind].items()}
            for kind in (LAYERS, CODES_ONLY)
        )
        calibration = Calibration(
            layers=layers,
            codes_only=codes_only or None,
            model=ModelIdentity.from_json(metadata["model"]),
            source=metadata["source"],
            num_tokens=_number(metadata["num_tokens"]),
        )
    calibration.model.check_is(model, f"{path} holds the calibration of {calibration.source:.200}", _REMEDY)
    return calibration


def _check_stored(name: str, stored: Any) -> tuple[str, int, str]:
    """For which caches, of which layer and what a tensor of the file is, or ValueError if no transform has it."""
    match = _TENSOR_NAME.fullmatch(name)
    if match is None or match[3] not in PART_DTYPES:
        raise ValueError(f"it holds a tensor {name!r}; tensors are named layers.N.{' or layers.N.'.join(PART_DTYPES)}")
    shape = stored.get_shape()
    if len(shape) != 2 or shape[0] < 1:
        raise ValueError(f"{name} is {stored.get_dtype()} {list(shape)}, not [num_kv_heads, head_dim]")
    check_head_dim(shape[1])
    return match[1], int(match[2]), match[3]


def _number(text: str) -> int:
    number = parse_json(text)
    if type(number) is not int:
        raise ValueError(f"num_tokens is {text!r}, no whole number")
    return number


def _check_layer(layer_index: int, transform: KeyTransform, num_layers: int) -> None:
    if not 0 <= layer_index < num_layers:
        raise ValueError(f"there is a transform of keys for layer {layer_index} of a model of {num_layers} layers")
    shapes = [tuple(tensor.shape) for tensor in transform.tensors().values()]
    if not shapes:
        raise ValueError(f"the transform of layer {layer_index} is the identity, which is not written to a file")
    try:
        transform.check(*shapes[0][:2])
    except ValueError as error:
        raise ValueError(f"layer {layer_index}: {error}") from None
    check_head_dim(shapes[0][1])
