"""A cache as a safetensors file."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from turboquant_core import TurboQuantConfig
from turboquant_hf._compat import PreTrainedConfig
from turboquant_hf.codec import LayerCodec
from turboquant_hf.layer import TurboQuantLayer
from turboquant_hf.paged import BLOCK_SIZE, num_blocks, page_layout
from turboquant_hf.states import PagedStates

HEADER = "turboquant-hf cache"
FORMAT_VERSION = 1
# What must be the same for keys and values of one model to mean anything to another.
MODEL_FIELDS = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
AGAIN = "Fill a new cache and save it again."


def save_layers(layers: Sequence[object], text_config: PreTrainedConfig, path: Path) -> None:
    """Write the codes of all layers, and what they were quantised with.

    Raises:
        ValueError: If a layer is not compressed or empty.
    """
    tensors, described = {}, []
    for index, layer in enumerate(layers):
        if type(layer) is not TurboQuantLayer:
            raise ValueError(
                f"layer {index} is a {type(layer).__name__}; only caches of full-attention layers that are compressed "
                "and grow can be saved"
            )
        if layer.get_seq_length() == 0:
            raise ValueError(f"layer {index} holds no tokens; feed the model a prompt before saving its cache")
        states = layer.states
        for name, tensor in _tensors(states).items():
            tensors[f"layers.{index}.{name}"] = tensor.contiguous()
        described.append(
            {
                "config": asdict(states.config),
                "batch_size": states.batch_size,
                "num_kv_heads": states.num_kv_heads,
                "num_tokens": states.num_tokens,
                "dtype": str(layer.dtype).removeprefix("torch."),
            }
        )
    header = {
        "version": FORMAT_VERSION,
        "core": _core_version(),
        "model": {field: getattr(text_config, field, None) for field in MODEL_FIELDS},
        "layers": described,
    }
    save_file(tensors, path, metadata={HEADER: json.dumps(header)})


def load_layers(path: Path, text_config: PreTrainedConfig, device: torch.device) -> list[TurboQuantLayer]:
    """The layers of a saved cache.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is damaged, no cache, or not one of this model or of this version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            header = _header(file.metadata() or {}, text_config, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return [
            _restore(index, described, tensors, text_config, path) for index, described in enumerate(header["layers"])
        ]
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, or a part of one ({error}). {AGAIN}") from error
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} has a header that is not a cache's ({error!r}). {AGAIN}") from error


def _tensors(states: PagedStates) -> dict[str, torch.Tensor]:
    """What is stored of a layer: whole blocks, with zeros where no token is."""
    codec = states.codec
    assert codec is not None  # there are tokens
    pages = states.pages[: num_blocks(states.num_tokens)].clone()
    last = page_layout(states.config, pages.shape[1]).views(pages[-1:])
    used = (states.num_tokens - 1) % BLOCK_SIZE + 1
    for field in vars(last).values():
        field[:, :, used:] = 0
    named = {"key_mean": codec.key_mean, "key_order": codec.key_order, "value_order": codec.value_order}
    return {"pages": pages, **{name: tensor for name, tensor in named.items() if tensor is not None}}


def _header(metadata: dict[str, str], text_config: PreTrainedConfig, path: Path) -> dict[str, Any]:
    if HEADER not in metadata:
        raise ValueError(f"{path} is a safetensors file, but no cache that TurboQuantCache.save wrote. {AGAIN}")
    header: dict[str, Any] = json.loads(metadata[HEADER])
    if header["version"] != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {header['version']}; this one reads {FORMAT_VERSION}. {AGAIN}")
    if header["core"] != _core_version():
        raise ValueError(
            f"{path} holds codes of turboquant-core {header['core']}, which {_core_version()} may read differently. "
            f"{AGAIN}"
        )
    for field, stored in header["model"].items():
        given = getattr(text_config, field, None)
        if stored != given:
            raise ValueError(f"{path} is the cache of a model whose {field} is {stored}; this model's is {given}")
    if len(header["layers"]) != text_config.num_hidden_layers:
        raise ValueError(f"{path} has {len(header['layers'])} layers; this model has {text_config.num_hidden_layers}")
    return header


def _restore(
    index: int, described: dict[str, Any], tensors: dict[str, torch.Tensor], text_config: PreTrainedConfig, path: Path
) -> TurboQuantLayer:
    config = TurboQuantConfig(**described["config"])
    batch_size, num_kv_heads, num_tokens = (described[name] for name in ("batch_size", "num_kv_heads", "num_tokens"))
    num_heads = batch_size * num_kv_heads
    vectors = (num_heads, config.head_dim)
    codec = LayerCodec(
        config, *(tensors.get(f"layers.{index}.{name}") for name in ("key_mean", "key_order", "value_order"))
    )
    pages = tensors.get(f"layers.{index}.pages")
    expected = (num_blocks(num_tokens), num_heads, page_layout(config, num_heads).head_bytes)
    if pages is None or pages.dtype != torch.uint8 or pages.shape != expected:
        found = "missing" if pages is None else f"{pages.dtype} {list(pages.shape)}"
        raise ValueError(f"{path}: pages of layer {index} are {found} and must be uint8 {list(expected)}. {AGAIN}")
    if (codec.key_mean is not None) != config.center_keys or any(t.shape != vectors for t in codec.tensors()):
        shapes = [list(tensor.shape) for tensor in codec.tensors()]
        raise ValueError(
            f"{path}: mean and orders of layer {index} are {shapes}, each must be {list(vectors)}. {AGAIN}"
        )
    states = PagedStates.restore(pages, codec, batch_size, num_tokens)
    return TurboQuantLayer.restore(states, getattr(torch, described["dtype"]), text_config)


def _core_version() -> str:
    """The part of core's version that the meaning of codes depends on."""
    return ".".join(version("turboquant-core").split(".")[:2])
