"""What a model's files say without loading it: the configuration, and names and sizes of its tensors."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from huggingface_hub import HfFileSystem, constants, errors, try_to_load_from_cache
from transformers import AutoConfig

from turboquant_hf._compat import PreTrainedConfig
from turboquant_hf.doctor.safetensors_header import read_floats, read_header
from turboquant_hf.models import model_source, read_gguf

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Most headers fit, and so does a tensor that is read.
REMOTE_BLOCK_BYTES = 1 << 18
LOADED_ITEMSIZE = 2


@dataclass(frozen=True)
class StoredTensor:
    """A tensor that has not been read.

    Attributes:
        nbytes: Bytes as stored; from a GGUF file those in 16 bits, in which it is loaded.
        load: Reads it, float32 [num_elements].
    """

    nbytes: int
    load: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration and the tensors of its files.

    Attributes:
        name: Hub id, folder or GGUF file.
        config: The configuration.
        tensors: Name to tensor; None where no safetensors files are found.
    """

    name: str
    config: PreTrainedConfig
    tensors: Mapping[str, StoredTensor] | None

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF file."""
        return Path(self.name).suffix == ".gguf"

    @property
    def weights_nbytes(self) -> int | None:
        """Bytes of all tensors; None where that is not known."""
        return None if self.tensors is None else sum(tensor.nbytes for tensor in self.tensors.values())


def short_name(name: str) -> str:
    """A hub id, or the last part of a path."""
    return Path(name).name if Path(name).exists() else name


def open_checkpoint(name: str) -> Checkpoint:
    """Read the configuration and the headers of a model's files.

    Args:
        name: A hub id, a folder, or a GGUF file.

    Raises:
        OSError: If there is no such model, its files cannot be reached, or its GGUF file is damaged.
        ValueError: If the configuration or another file is damaged or of an unknown model.
    """
    source, kwargs = model_source(name)
    if kwargs:
        # First, because transformers reads past the end of a file that is cut off.
        tensors = _gguf_tensors(name)
        return Checkpoint(name, AutoConfig.from_pretrained(source, **kwargs), tensors)
    config = AutoConfig.from_pretrained(source)
    with _hub_is_named():
        return Checkpoint(name, config, _safetensors_tensors(source))


def _safetensors_tensors(source: str) -> dict[str, StoredTensor] | None:
    """The tensors of a folder or hub repository."""
    index = _open(source, INDEX_FILE)
    if index is None:
        return _tensors_of(source, SINGLE_FILE)
    with index:
        data = index.read()
    try:
        files = sorted(set(json.loads(data)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{INDEX_FILE} of {source} is damaged: it names no files") from None
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        found = _tensors_of(source, file)
        if found is None:
            raise OSError(f"{INDEX_FILE} of {source} names {file}, which is not there")
        tensors |= found
    return tensors


def _tensors_of(source: str, filename: str) -> dict[str, StoredTensor] | None:
    file = _open(source, filename)
    if file is None:
        return None
    with file:
        ranges = read_header(file, f"{source}/{filename}")

    def load(tensor: str) -> torch.Tensor:
        with _hub_is_named():
            opened = _open(source, filename)
            if opened is None:
                raise OSError(f"{source}/{filename} is gone")
            with opened:
                return read_floats(opened, ranges[tensor])

    return {name: StoredTensor(at.stop - at.start, partial(load, name)) for name, at in ranges.items()}


def _open(source: str, filename: str) -> BinaryIO | None:
    """A file of a folder, or of a hub repository from the cache or else by byte ranges; None if there is none."""
    if Path(source).is_dir():
        path = Path(source) / filename
        return path.open("rb") if path.is_file() else None
    cached = try_to_load_from_cache(source, filename)
    if isinstance(cached, str):
        return Path(cached).open("rb")
    # What else the cache gives is a note that there is no such file.
    if cached is not None or constants.HF_HUB_OFFLINE:
        return None
    try:
        remote: Any = HfFileSystem().open(f"{source}/{filename}", "rb", block_size=REMOTE_BLOCK_BYTES)
    except FileNotFoundError:
        return None
    return cast(BinaryIO, remote)


@contextmanager
def _hub_is_named() -> Iterator[None]:
    """Turn the errors of HTTP into OSError: a hub that does not answer."""
    try:
        yield
    # That of httpx or of httpx2, whichever huggingface_hub has.
    except errors.HTTPError as error:  # type: ignore[attr-defined]
        if isinstance(error, OSError):
            raise
        raise OSError(
            f"{constants.ENDPOINT} does not answer ({error}), and the weights are not in the cache. With "
            "HF_HUB_OFFLINE=1 only what is in the cache is read, the configuration at least."
        ) from error


def _gguf_tensors(name: str) -> dict[str, StoredTensor]:
    from gguf import dequantize

    def load(tensor: Any) -> torch.Tensor:
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type)).float().flatten()

    return {
        tensor.name: StoredTensor(LOADED_ITEMSIZE * int(tensor.n_elements), partial(load, tensor))
        for tensor in read_gguf(name).tensors
    }
