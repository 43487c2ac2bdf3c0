"""A TurboQuant KV cache for Hugging Face transformers."""

from importlib.metadata import version

from turboquant_hf.attention.function import register
from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.memory import LayerMemory, MemoryReport
from turboquant_hf.wrapper import CompressedDynamicCache

__version__ = version("turboquant-hf")

register()

__all__ = ["CompressedDynamicCache", "LayerMemory", "MemoryReport", "TurboQuantCache", "TurboQuantLayer"]
