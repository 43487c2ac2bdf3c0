"""What turboquant-vllm serves and vLLM takes, where turboquant-hf can read it too: neither imports the other."""

HEAD_DIMS = (64, 80, 96, 128, 192, 256, 512)
"""head_dim that the backend takes: those that its kernels are tested at."""

LARGEST_HEAD_DIM = max(HEAD_DIMS)
"""A head of this size takes as much of a page as two of half of it, two scales more than are stored of it: pages of
layers with both sizes, which Gemma 4 has, become equal by their tokens."""

FLASH_HEAD_DIM = 256
"""Largest head_dim that prefills on every card; larger ones need FlashAttention 4, which has them on one."""

LARGER_HEADS_MAJOR = 9
"""Major compute capability of that card."""

BLOCK_SIZE_MULTIPLE = 16
"""Pages hold a multiple of so many tokens."""

MIN_CAPABILITY = (8, 0)
"""Oldest compute capability: FlashAttention 2, which prefills, needs Ampere."""

MEMORY_SHARE = 0.92
"""Share of a card's memory that vLLM takes by default."""

BATCHED_TOKENS = 8192
"""Tokens of a step at most, by default."""

RESERVE_GIB = 2.3
"""Activations, CUDA graphs and CUDA itself: what benchmarks/results/engine.json leaves for them on an H200."""
