"""Write a cache of codes and attend on it: Triton kernels on a GPU, plain PyTorch elsewhere, behind one signature.

Each operation is a folder: its `api`, its `reference`, its `paths` where there are several, and a folder of each path.
"""

from turboquant_core.ops.cache_gather import cache_gather
from turboquant_core.ops.cache_update import cache_update
from turboquant_core.ops.decode_attention import decode_attention
from turboquant_core.ops.merge_attention import merge_attention

__all__ = ["cache_gather", "cache_update", "decode_attention", "merge_attention"]
