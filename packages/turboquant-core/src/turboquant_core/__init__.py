"""TurboQuant: vectors of a KV cache as a few bits per coordinate, after arXiv 2504.19874."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "PRESETS",
    "Codebook",
    "KVCacheLayout",
    "KeyTransform",
    "MSEQuantizer",
    "OutlierQuantizer",
    "ProdQuantizer",
    "QuantizedTensor",
    "Rotation",
    "TurboQuantConfig",
    "VectorFormat",
    "grid_codebook",
    "pack",
    "unpack",
]

if TYPE_CHECKING:
    __version__: str
    from turboquant_core._public import (
        PRESETS,
        Codebook,
        KeyTransform,
        KVCacheLayout,
        MSEQuantizer,
        OutlierQuantizer,
        ProdQuantizer,
        QuantizedTensor,
        Rotation,
        TurboQuantConfig,
        VectorFormat,
        grid_codebook,
        pack,
        unpack,
    )
else:

    def __getattr__(name: str) -> Any:
        # Not before one of them is asked for: torch takes seconds to import, and `turboquant --help` does without.
        if name == "__version__":
            return import_module("importlib.metadata").version("turboquant-core")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = import_module("turboquant_core._public")
        globals().update({each: getattr(public, each) for each in __all__})
        return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
