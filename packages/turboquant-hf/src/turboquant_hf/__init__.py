"""A TurboQuant KV cache for Hugging Face transformers."""

from importlib.metadata import version

from turboquant_hf.attention import register
from turboquant_hf.cache import TurboQuantCache
from turboquant_hf.layer import TurboQuantLayer
from turboquant_hf.report import LayerMemory, MemoryReport

__version__ = version("turboquant-hf")

register()

__all__ = ["LayerMemory", "MemoryReport", "TurboQuantCache", "TurboQuantLayer"]
