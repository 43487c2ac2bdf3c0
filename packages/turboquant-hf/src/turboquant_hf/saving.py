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
from turboquant_core.vector_format import OUTLIER_BITS
from turboquant_hf._compat import PreTrainedConfig
from turboquant_hf.codec import LayerCodec
from turboquant_hf.kept import KeptTokens
from turboquant_hf.layer import TurboQuantLayer
from turboquant_hf.paged import BLOCK_SIZE, num_blocks, page_layout
from turboquant_hf.states import PagedStates

HEADER = "turboquant-hf cache"
FORMAT_VERSION = 4
# What must be the same for keys and values of one model to mean anything to another.
MODEL_FIELDS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
CODEC_TENSORS = ("key_mean", "key_order", "value_order")
KEPT_TENSORS = ("kept_keys", "kept_values")
KEPT_FIELDS = ("sink_tokens", "recent_tokens", "num_kept", "is_padded")
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
                "kept": _describe(states.kept, states.num_tokens),
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
    pages = states.pages[: num_blocks(states.num_tokens)].clone()
    last = page_layout(states.config, pages.shape[1]).views(pages[-1:])
    used = (states.num_tokens - 1) % BLOCK_SIZE + 1
    for field in vars(last).values():
        field[:, :, used:] = 0
    named = {"pages": pages}
    if states.codec is not None:
        named |= {name: getattr(states.codec, name) for name in CODEC_TENSORS}
    if states.kept is not None:
        named |= dict(zip(KEPT_TENSORS, states.kept.in_order(states.num_tokens), strict=True))
        if states.kept.row_starts is not None:
            # Layers share it, and safetensors refuses tensors that share memory.
            named["row_starts"] = states.kept.row_starts.clone()
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _describe(kept: KeptTokens | None, num_tokens: int) -> dict[str, int] | None:
    if kept is None:
        return None
    num_kept = min(kept.sink_tokens, num_tokens) + num_tokens - kept.first_held(num_tokens)
    is_padded = kept.row_starts is not None
    return dict(zip(KEPT_FIELDS, (kept.sink_tokens, kept.recent_tokens, num_kept, is_padded), strict=True))


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
    dtype = getattr(torch, described["dtype"])

    def take(name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        tensor = tensors.get(f"layers.{index}.{name}")
        if tensor is None or tensor.dtype != dtype or tensor.shape != shape:
            found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{path}: {name} of layer {index} are {found} and must be {dtype} {list(shape)}. {AGAIN}")
        return tensor

    pages = take("pages", torch.uint8, num_blocks(num_tokens), num_heads, page_layout(config, num_heads).head_bytes)
    kept = None
    if described["kept"] is not None:
        sinks, recent, num_kept, is_padded = (described["kept"][field] for field in KEPT_FIELDS)
        kept = KeptTokens.empty(sinks, recent, (batch_size, num_kv_heads, config.head_dim), dtype, pages.device)
        shape = (batch_size, num_kv_heads, num_kept, config.head_dim)
        keys, values = (take(name, dtype, *shape) for name in KEPT_TENSORS)
        kept.restore(keys, values, num_tokens)
        if is_padded:
            kept.row_starts = take("row_starts", torch.int32, batch_size)
    codec = None
    if kept is None or num_tokens > kept.sink_tokens:
        vectors = (num_heads, config.head_dim)
        codec = LayerCodec(
            config,
            take("key_mean", torch.float32, *vectors) if config.center_keys else None,
            take("key_order", torch.int64, *vectors) if config.key_bits in OUTLIER_BITS else None,
            take("value_order", torch.int64, *vectors) if config.value_bits in OUTLIER_BITS else None,
        )
    states = PagedStates.restore(config, batch_size, num_tokens, pages, codec, kept)
    return TurboQuantLayer.restore(states, dtype, text_config)


def _core_version() -> str:
    """The part of core's version that the meaning of codes depends on."""
    return ".".join(version("turboquant-core").split(".")[:2])
