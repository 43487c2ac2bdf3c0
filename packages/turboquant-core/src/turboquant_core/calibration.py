"""Key means taken beforehand, in a safetensors file: `turboquant calibrate` writes it, turboquant-vllm loads it."""

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
from turboquant_core.model_identity import ModelIdentity

FORMAT = "turboquant-key-means"
FORMAT_VERSION = 1

_TENSOR_NAME = re.compile(r"layers\.(0|[1-9][0-9]{0,5})\.key_mean")
_REMEDY = "Write it again with `turboquant calibrate MODEL --out FILE`."


@dataclass(frozen=True, eq=False)
class KeyMeans:
    """The mean key of every attention layer, after the rotary embedding.

    Attributes:
        means: Layer index to mean, float32 [num_kv_heads, head_dim]; sizes may differ between layers.
        model: The model whose keys they are.
        source: What that model was called when they were taken: a hub id or a path. Informs only.
        num_tokens: Tokens that each mean was taken over.
    """

    means: Mapping[int, torch.Tensor]
    model: ModelIdentity
    source: str
    num_tokens: int

    def __post_init__(self) -> None:
        if not self.means:
            raise ValueError("there is no layer with a key mean")
        if self.num_tokens < 1:
            raise ValueError(f"num_tokens is {self.num_tokens}; a mean is taken over at least 1")
        for layer_index, mean in self.means.items():
            _check_mean(layer_index, mean, self.model.num_layers)

    def of_layer(self, layer_index: int, num_kv_heads: int, head_dim: int) -> torch.Tensor:
        """The mean of one layer, float32 [num_kv_heads, head_dim].

        Args:
            layer_index: Index of the layer in the text model.
            num_kv_heads: KV heads of the whole layer, not of one tensor-parallel rank.
            head_dim: Dimension of its keys.

        Raises:
            ValueError: If there is no mean for the layer, or one of another shape.
        """
        mean = self.means.get(layer_index)
        if mean is None:
            raise ValueError(f"the key means of {self.source} have none for layer {layer_index}. {_REMEDY}")
        if tuple(mean.shape) != (num_kv_heads, head_dim):
            raise ValueError(
                f"the key mean of layer {layer_index} of {self.source} is {list(mean.shape)}, and the layer has "
                f"[num_kv_heads, head_dim] = {[num_kv_heads, head_dim]}. {_REMEDY}"
            )
        return mean


def write_key_means(path: str | os.PathLike[str], key_means: KeyMeans) -> None:
    """Write key means to a safetensors file; a file that is there is replaced once the new one is complete."""
    tensors = {f"layers.{index}.key_mean": mean.cpu().contiguous() for index, mean in key_means.means.items()}
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "model": key_means.model.to_json(),
        "source": key_means.source,
        "num_tokens": str(key_means.num_tokens),
    }
    write_atomically(path, save(tensors, metadata))


def read_key_means(path: str | os.PathLike[str], model: ModelIdentity | None = None) -> KeyMeans:
    """Read key means from a safetensors file; nothing else is accepted, and nothing in it is executed.

    Args:
        path: A file that `write_key_means` wrote.
        model: The model that they are for.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, something else, or belongs to another model.
    """
    path = Path(path)
    with reading(path, "key means", _REMEDY), open_safetensors(path) as file:
        metadata = file.metadata() or {}
        check_format(metadata, FORMAT, str(FORMAT_VERSION))
        if missing := [name for name in ("model", "source", "num_tokens") if name not in metadata]:
            raise ValueError(f"it lacks {', '.join(map(repr, missing))} in its metadata")
        # Shapes come first: a tensor that cannot be a mean is not loaded.
        for name in file.keys():  # noqa: SIM118 (no mapping)
            _check_stored(name, file.get_slice(name))
        key_means = KeyMeans(
            means={_layer_index(name): file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
            model=ModelIdentity.from_json(metadata["model"]),
            source=metadata["source"],
            num_tokens=_number(metadata["num_tokens"]),
        )
    key_means.model.check_is(model, f"{path} holds the key means of {key_means.source:.200}", _REMEDY)
    return key_means


def _check_stored(name: str, stored: Any) -> None:
    if _TENSOR_NAME.fullmatch(name) is None:
        raise ValueError(f"it holds a tensor {name!r}; tensors are named layers.N.key_mean")
    _check_shape(name, stored.get_dtype(), "F32", stored.get_shape())


def _number(text: str) -> int:
    number = parse_json(text)
    if type(number) is not int:
        raise ValueError(f"num_tokens is {text!r}, no whole number")
    return number


def _layer_index(name: str) -> int:
    return int(name.split(".")[1])


def _check_mean(layer_index: int, mean: torch.Tensor, num_layers: int) -> None:
    if not 0 <= layer_index < num_layers:
        raise ValueError(f"there is a key mean for layer {layer_index} of a model of {num_layers} layers")
    _check_shape(f"the key mean of layer {layer_index}", mean.dtype, torch.float32, list(mean.shape))
    if not mean.isfinite().all():
        raise ValueError(f"the key mean of layer {layer_index} is not finite")


def _check_shape(name: str, dtype: object, expected: object, shape: list[int]) -> None:
    if dtype != expected or len(shape) != 2 or shape[0] < 1:
        raise ValueError(f"{name} is {dtype} {shape}, not float32 [num_kv_heads, head_dim]")
    check_head_dim(shape[1])
