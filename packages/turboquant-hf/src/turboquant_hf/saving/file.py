"""A cache as a safetensors file.

The header has checksums of all tensors, and a checksum of its own. What must be in the file follows from it, and is
compared with what is before anything is allocated.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from turboquant_core.files import open_safetensors, reading, replacing
from turboquant_core.key_transform import KeyTransform
from turboquant_hf._compat import PreTrainedConfig
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.saving.header import (
    DTYPES,
    HEADER,
    KEPT_TENSORS,
    ROW_STARTS,
    SavedCache,
    SavedKept,
    SavedLayer,
    slot_tensors,
    stored_name,
)
from turboquant_hf.storage.codec import LayerCodec, of_equal_rows
from turboquant_hf.storage.full_precision import FullPrecision
from turboquant_hf.storage.growing.length import GrowingLength
from turboquant_hf.storage.growing.pages import GrowingPages
from turboquant_hf.storage.store import Store
from turboquant_hf.storage.tables import CODES_ONLY, FullPrecisionSizes

# As safetensors calls them.
STORED_DTYPES = {
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
CHECKSUM_THREADS = 4
AGAIN = "Fill a new cache and save it again."


def save_layers(
    layers: Sequence[object], text_config: PreTrainedConfig, path: Path, *, overwrite: bool = False
) -> None:
    """Write the codes of all layers, and what they were quantised with.

    Raises:
        FileExistsError: If there is something that is no saved cache, and it is not to be overwritten.
        OSError: If the file cannot be written.
        ValueError: If a layer is not compressed or empty, or layers disagree.
    """
    tensors: dict[str, torch.Tensor] = {}
    described, row_starts = [], None
    for index, layer in enumerate(layers):
        if type(layer) is not TurboQuantLayer:
            raise ValueError(
                f"layer {index} is a {type(layer).__name__}; only caches of full-attention layers that are compressed "
                "and grow can be saved"
            )
        if layer.get_seq_length() == 0:
            raise ValueError(f"layer {index} holds no tokens; feed the model a prompt before saving its cache")
        mine = _tensors(layer)
        tensors |= {stored_name(index, name): tensor for name, tensor in mine.items()}
        described.append(_described(layer, _checksums(mine)))
        if index == 0:
            row_starts = layer.store.length.row_starts
    if row_starts is not None:
        tensors[ROW_STARTS] = row_starts.cpu()
    saved = SavedCache(described, None if row_starts is None else _checksum(tensors[ROW_STARTS]))
    saved.check(text_config)
    if not overwrite and path.exists() and not path.is_dir() and not _is_ours(path):
        raise FileExistsError(
            f"{path} is no saved cache, and would be lost. Save under another name, or pass overwrite=True to replace "
            "it. Nothing there was changed."
        )
    # A file that a power failure cut off is refused when it is loaded: there is no need to wait for the disk.
    with replacing(path, wait_for_disk=False) as unfinished:
        try:
            save_file(tensors, unfinished, metadata=saved.to_metadata(text_config))
        except SafetensorError as error:
            raise OSError(str(error)) from error


def load_layers(
    path: Path, layers: Sequence[object], text_config: PreTrainedConfig, device: torch.device
) -> list[TurboQuantLayer]:
    """The layers of a saved cache.

    Args:
        path: The file.
        layers: Those of a new cache for the model.
        text_config: The configuration of the model.
        device: Where they are put.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is damaged, no cache, or not one of this model or of this version.
    """
    with reading(path, "saved cache", AGAIN), open_safetensors(path) as file:
        saved = SavedCache.from_metadata(file.metadata() or {}, layers, text_config)
        tensors = {name: tensor.to(device) for name, tensor in _stored(file, saved).items()}
        return [
            _restore(
                layer,
                {name: tensors[stored_name(index, name)] for name in layer.tensors(saved.is_padded)},
                tensors.get(ROW_STARTS),
                text_config,
            )
            for index, layer in enumerate(saved.layers)
        ]


def _is_ours(path: Path) -> bool:
    """Whether a file is a saved cache, of whichever version, or empty."""
    # A pipe would keep whoever looks into it.
    if not path.is_file():
        return False
    try:
        if not path.stat().st_size:
            return True
        with open_safetensors(path) as file:
            return HEADER in (file.metadata() or {})
    except ValueError:
        return False


def _tensors(layer: TurboQuantLayer) -> dict[str, torch.Tensor]:
    """What is stored of a layer, on the CPU: its tokens alone, so that their number is a size of every tensor."""
    store = layer.store
    pages, length, full_precision = store.pages, store.length, store.full_precision
    assert isinstance(pages, GrowingPages)
    assert isinstance(length, GrowingLength)
    fields = pages.fields(length.num_tokens)
    named = {name: fields[field] for field, name in slot_tensors(store.config).items()}
    if pages.codec is not None:
        named |= pages.codec.named()
    # Once, and not for every row; also where there are no codes yet.
    named |= layer.key_transform.tensors()
    if full_precision is not None:
        named |= dict(
            zip(
                KEPT_TENSORS,
                full_precision.in_order(length.num_first, length.held_from, length.num_tokens),
                strict=True,
            )
        )
    return {name: tensor.detach().contiguous().cpu() for name, tensor in named.items()}


def _described(layer: TurboQuantLayer, checksums: dict[str, int]) -> SavedLayer:
    store, length, kept = layer.store, layer.store.length, None
    assert isinstance(length, GrowingLength)
    if store.full_precision is not None:
        num_kept = length.num_first + length.num_tokens - length.held_from
        kept = SavedKept(length.sizes.first, length.sizes.recent, num_kept)
    dtype = str(layer.dtype).removeprefix("torch.")
    return SavedLayer(
        config=store.config,
        batch_size=store.batch_size,
        num_kv_heads=store.num_kv_heads,
        num_tokens=length.num_tokens,
        dtype=dtype,
        given=list(layer.key_transform.tensors()),
        kept=kept,
        checksums=checksums,
    )


def _checksums(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """The crc32 of tensors on the CPU."""
    with ThreadPoolExecutor(CHECKSUM_THREADS) as threads:
        return dict(zip(tensors, threads.map(_checksum, tensors.values()), strict=True))


def _checksum(tensor: torch.Tensor) -> int:
    content: Any = tensor.flatten().view(torch.uint8).numpy()
    return crc32(content)


def _stored(file: Any, saved: SavedCache) -> dict[str, torch.Tensor]:
    """All tensors of a file, on the CPU; none is read before all have the types and shapes that they must have."""
    expected = saved.tensors()
    found = set(file.keys())
    if missing := sorted(expected.keys() - found):
        raise ValueError(f"{missing[0]} is missing")
    if more := sorted(found - expected.keys()):
        raise ValueError(f"it has a tensor {more[0]!r}, of no layer")
    for name, (dtype, shape) in expected.items():
        stored = file.get_slice(name)
        if (stored.get_dtype(), tuple(stored.get_shape())) != (STORED_DTYPES[dtype], shape):
            raise ValueError(
                f"{name} is {stored.get_dtype()} {stored.get_shape()} and must be {STORED_DTYPES[dtype]} {list(shape)}"
            )
    tensors = {name: file.get_tensor(name) for name in expected}
    checksums = saved.checksums()
    for name, checksum in _checksums(tensors).items():
        if checksum != checksums.get(name):
            raise ValueError(f"{name} is damaged: its checksum is another")
    return tensors


def _restore(
    layer: SavedLayer, tensors: dict[str, torch.Tensor], row_starts: torch.Tensor | None, text_config: PreTrainedConfig
) -> TurboQuantLayer:
    config, num_tokens, full_precision = layer.config, layer.num_tokens, None
    fields = {field: tensors[name] for field, name in slot_tensors(config).items()}
    given = KeyTransform.from_tensors({name: tensors[name] for name in layer.given})
    codec = None
    if layer.has_codes(row_starts is not None):
        of_heads = of_equal_rows(given, layer.batch_size, fields["key_codes"].device)
        codec = LayerCodec.of_named(config, tensors | of_heads.tensors())
    pages = GrowingPages.restored(config, layer.batch_size, fields, codec)
    sizes, num_kept = CODES_ONLY, 0
    if layer.kept is not None:
        sizes, num_kept = FullPrecisionSizes(layer.kept.sink_tokens, layer.kept.recent_tokens), layer.kept.num_kept
    if row_starts is not None and not bool(((row_starts >= 0) & (row_starts <= num_tokens)).all()):
        raise ValueError(f"{ROW_STARTS} are not all from 0 to the {num_tokens:,} tokens of a row")
    length = GrowingLength.restored(sizes, num_tokens, num_kept - min(sizes.first, num_tokens), row_starts)
    if layer.kept is not None:
        keys, values = (tensors[name] for name in KEPT_TENSORS)
        full_precision = FullPrecision.restored(sizes, keys, values, length.num_first, length.held_from)
    return TurboQuantLayer.restore(Store(pages, length, full_precision), DTYPES[layer.dtype], text_config, given)
