"""What a model's files say without loading it: the configuration, and names and sizes of its tensors."""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from huggingface_hub import HfFileSystem, constants, errors, try_to_load_from_cache

from turboquant_core.files import parse_json
from turboquant_hf._compat import PreTrainedConfig
from turboquant_hf.tools.doctor.safetensors_header import read_floats, read_header
from turboquant_hf.tools.models import ModelFiles, find_model

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
# Most headers fit, and so does a tensor that is read.
REMOTE_BLOCK_BYTES = 1 << 18
LOADED_ITEMSIZE = 2
# Those of the largest models have a few.
MAX_INDEX_BYTES = 1 << 26
MAX_NAME = 255

# Of the repository itself, not of a folder elsewhere.
_FILE_NAME = re.compile(r"(?!\.\.?(/|$))[^/\\\0]+(/(?!\.\.?(/|$))[^/\\\0]+)*")
_NO_WEIGHTS = (
    "{why}, and the weights are not in the cache. With HF_HUB_OFFLINE=1 only what is in the cache is read, the "
    "configuration at least."
)


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
        ValueError: If the configuration or another file is damaged, or of a model that transformers does not know or
            that brings code of its own.
    """
    files = find_model(name)
    if "gguf_file" in files.arguments:
        return Checkpoint(name, files.config, _gguf_tensors(name))
    with _hub_is_named():
        return Checkpoint(name, files.config, _safetensors_tensors(files))


def _safetensors_tensors(files: ModelFiles) -> dict[str, StoredTensor] | None:
    """The tensors of a folder or hub repository."""
    index = _open(files, INDEX_FILE)
    if index is None:
        return _tensors_of(files, SINGLE_FILE)
    with index:
        data = index.read(MAX_INDEX_BYTES + 1)
    tensors: dict[str, StoredTensor] = {}
    for file in _files_of_index(data, files.source):
        found = _tensors_of(files, file)
        if found is None:
            raise OSError(f"{INDEX_FILE} of {files.source} names {file:.200}, which is not there")
        tensors |= found
    return tensors


def _files_of_index(data: bytes, source: str) -> list[str]:
    """The names of the files that an index names."""
    try:
        index = parse_json(data, MAX_INDEX_BYTES)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("it names no files")
        for name in weight_map.values():
            if not isinstance(name, str) or len(name) > MAX_NAME or not _FILE_NAME.fullmatch(name):
                raise ValueError(f"it names {name!r:.200} for a file")
    except ValueError as error:
        raise ValueError(f"{INDEX_FILE} of {source} is damaged: {error}. Download it again.") from None
    return sorted(set(weight_map.values()))


def _tensors_of(files: ModelFiles, filename: str) -> dict[str, StoredTensor] | None:
    file = _open(files, filename)
    if file is None:
        return None
    with file:
        ranges = read_header(file, f"{files.source}/{filename}")

    def load(tensor: str) -> torch.Tensor:
        with _hub_is_named():
            opened = _open(files, filename)
            if opened is None:
                raise OSError(f"{files.source}/{filename} is gone")
            with opened:
                return read_floats(opened, ranges[tensor])

    return {name: StoredTensor(at.stop - at.start, partial(load, name)) for name, at in ranges.items()}


def _open(files: ModelFiles, filename: str) -> BinaryIO | None:
    """A file of a folder, or of a hub repository from the cache or else by byte ranges; None if there is none."""
    if Path(files.source).is_dir():
        path = Path(files.source) / filename
        return path.open("rb") if path.is_file() else None
    cached = try_to_load_from_cache(files.source, filename)
    if isinstance(cached, str):
        return Path(cached).open("rb")
    # What else the cache gives is a note that there is no such file.
    if cached is not None or constants.HF_HUB_OFFLINE:
        return None
    if files.is_offline:
        raise OSError(_NO_WEIGHTS.format(why=f"{constants.ENDPOINT} does not answer"))
    try:
        remote: Any = HfFileSystem().open(f"{files.source}/{filename}", "rb", block_size=REMOTE_BLOCK_BYTES)
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
        raise OSError(_NO_WEIGHTS.format(why=f"{constants.ENDPOINT} does not answer ({error})")) from error


def _gguf_tensors(name: str) -> dict[str, StoredTensor]:
    from gguf import GGUFReader, dequantize

    def load(tensor: Any) -> torch.Tensor:
        return torch.tensor(dequantize(tensor.data, tensor.tensor_type)).float().flatten()

    try:
        tensors = GGUFReader(name).tensors
    # What is wrong with a file that is whole, such as a name that is there twice, it raises with one class or another.
    except Exception as error:
        raise OSError(f"{name} is damaged ({error!s:.200}). Download it again.") from error
    return {
        tensor.name: StoredTensor(LOADED_ITEMSIZE * int(tensor.n_elements), partial(load, tensor)) for tensor in tensors
    }
