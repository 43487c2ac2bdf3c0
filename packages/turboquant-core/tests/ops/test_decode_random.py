import random

import pytest
import torch

from turboquant_core.ops import decode_attention
from turboquant_core.ops.decode_attention.paths import FASTEST_FIRST
from turboquant_core.testing.decode import DecodeCase, build, relative_error
from turboquant_core.vector_format import SPLIT_BITS

# head_dim, key_bits, value_bits, num_heads, num_kv_heads, block_size, query tokens, window: a kernel to compile each.
KERNELS = [
    (128, 4, 4, 32, 8, 16, 1, None),
    (128, 4, 4, 32, 8, 16, 4, None),
    (128, 3, 3, 8, 1, 32, 1, None),
    (128, 8, 4, 6, 2, 16, 1, None),
    (128, 2, 2, 4, 4, 64, 2, None),
    (128, 6, 4, 16, 1, 16, 1, 100),
    (64, 4, 4, 64, 8, 16, 1, 128),
    (64, 3, 5, 9, 3, 16, 1, None),
    (256, 4, 4, 8, 4, 16, 1, None),
    (96, 4, 4, 4, 4, 16, 1, None),
]

USUAL_ERROR = 4e-3


def cases_per_kernel(device):
    return 100 if device.type == "cuda" else 1


@pytest.mark.parametrize("kernel", KERNELS)
def test_random_rows(device, kernel):
    """On a GPU a thousand cases: batches, lengths, padding and page tables at random, judged as one."""
    head_dim, key_bits, value_bits, num_heads, num_kv_heads, block_size, query_len, window = kernel
    generator = random.Random(repr(kernel))
    longest = 3000 if device.type == "cuda" else 100
    for seed in range(cases_per_kernel(device)):
        batch = generator.choice([1, 2, 3, 7, 40] if device.type == "cuda" else [2])
        lengths = tuple(generator.choice([0, 1, 15, 16, 17, generator.randrange(longest)]) for _ in range(batch))
        starts = tuple(generator.choice([0, 0, 16, generator.randrange(20)]) for _ in range(batch))
        ends = tuple(generator.choice([0, length + 1, generator.randrange(length + 1)]) for length in lengths)
        case = DecodeCase(
            head_dim=head_dim,
            key_bits=key_bits,
            value_bits=value_bits,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            seq_lens=tuple(max(length, query_len) if length else 0 for length in lengths),
            query_lens=query_len,
            seq_starts=starts if seed % 3 == 0 else None,
            seq_ends=ends if seed % 3 == 0 else None,
            window=window,
            paged=generator.random() < 0.8,
            sinks=seed % 2 == 0,
            key_mean=seed % 4 == 0,
            key_split=seed % 3 == 2 and key_bits in SPLIT_BITS,
            key_scale=seed % 5 == 0,
            key_channel_order=seed % 5 == 0,
        )
        inputs = build(case, device, seed)
        path = next(path.name for path in FASTEST_FIRST if path.obstacle(case.layout, device) is None)
        out, lse = decode_attention(
            inputs.query, inputs.pages, inputs.block_table, inputs.seq_lens, case.layout,
            return_lse=True, path=path, **inputs.options,
        )  # fmt: skip
        exact, exact_lse = inputs.exact()
        assert torch.equal(lse.isfinite(), exact_lse.isfinite()), (case, path)
        if exact.any():
            error = relative_error(out, exact)
            # What eager attention makes takes long to compute, and is seldom less.
            if seed % 10 == 0 or error > USUAL_ERROR:
                assert error <= relative_error(inputs.eager_bfloat16(), exact), (case, path)
