"""Write a cache of codes and attend on it: Triton kernels on a GPU, plain PyTorch elsewhere, behind one signature."""

from turboquant_core.ops.cache_gather import cache_gather
from turboquant_core.ops.cache_update import cache_update
from turboquant_core.ops.decode_attention import decode_attention
from turboquant_core.ops.warm_up import warm_up

__all__ = ["cache_gather", "cache_update", "decode_attention", "warm_up"]
