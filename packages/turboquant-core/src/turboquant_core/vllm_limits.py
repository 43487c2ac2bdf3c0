"""What turboquant-vllm serves, where turboquant-hf can read it too: neither imports the other."""

HEAD_DIMS = (64, 80, 96, 128, 192, 256, 512)
"""head_dim that the backend takes: those that its kernels are tested at."""

BLOCK_SIZE_MULTIPLE = 16
"""Pages hold a multiple of so many tokens."""

MIN_CAPABILITY = (8, 0)
"""Oldest compute capability: FlashAttention 2, which prefills, needs Ampere."""
