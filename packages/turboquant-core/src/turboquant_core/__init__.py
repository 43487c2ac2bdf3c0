"""TurboQuant: vectors of a KV cache as a few bits per coordinate, after arXiv 2504.19874."""

from importlib.metadata import version

from turboquant_core.codebook import Codebook, lloyd_max_codebook
from turboquant_core.config import PRESETS, TurboQuantConfig
from turboquant_core.layout import KVCacheLayout
from turboquant_core.mse import MSEQuantizer
from turboquant_core.outlier import OutlierQuantizer
from turboquant_core.packing import pack, unpack
from turboquant_core.prod import ProdQuantizer
from turboquant_core.quantized import QuantizedTensor
from turboquant_core.rotation import Rotation
from turboquant_core.vector_format import VectorFormat

__version__ = version("turboquant-core")

__all__ = [
    "PRESETS",
    "Codebook",
    "KVCacheLayout",
    "MSEQuantizer",
    "OutlierQuantizer",
    "ProdQuantizer",
    "QuantizedTensor",
    "Rotation",
    "TurboQuantConfig",
    "VectorFormat",
    "lloyd_max_codebook",
    "pack",
    "unpack",
]
