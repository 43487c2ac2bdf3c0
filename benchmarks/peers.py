"""Paged decode attention that a user would pick instead, and how all of them are timed."""

from collections.abc import Callable, Sequence

import torch

BLOCK_SIZE = 16
TIMED_PRESETS = ("tq4", "tq3", "tq2", "k6v4", "k8v4")


def graph_milliseconds(calls: Sequence[Callable[[], object]], replays: int = 20) -> float:
    """Median time of one of `calls`, which run one after another in a CUDA graph.

    A graph is how engines decode, and leaves out what Python takes to launch. The calls should work on different
    memory, more of it than the L2 cache holds.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    return sorted(times)[len(times) // 2]


def copies_beyond_l2(bytes_each: int) -> int:
    """How many caches of that size are several times the L2 cache."""
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, -(-6 * l2_bytes // bytes_each))


def shuffled_table(batch: int, context: int, block_size: int = BLOCK_SIZE) -> torch.Tensor:
    """int32 [batch, context / block_size], every page once."""
    blocks = batch * context // block_size
    return torch.randperm(blocks, device="cuda").to(torch.int32).view(batch, -1)


def flash_attention_3(
    batch: int, context: int, num_heads: int, num_kv_heads: int, head_dim: int, *, fp8: bool
) -> float:
    """Milliseconds of FlashAttention 3, as vLLM ships it, on bf16 or fp8 pages."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    cache_bytes = 2 * batch * context * num_kv_heads * head_dim * (1 if fp8 else 2)
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    query = torch.randn(batch, num_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(query)
    scales = {}
    if fp8:
        query = query.to(torch.float8_e4m3fn)
        one = torch.ones(batch, num_kv_heads, device="cuda")
        scales = {"q_descale": one, "k_descale": one, "v_descale": one}

    def prepare() -> Callable[[], object]:
        table = shuffled_table(batch, context)
        shape = (table.numel(), BLOCK_SIZE, num_kv_heads, head_dim)
        key, value = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        if fp8:
            key, value = key.to(torch.float8_e4m3fn), value.to(torch.float8_e4m3fn)
        return lambda: flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=context,
            softmax_scale=head_dim**-0.5,
            causal=True,
            block_table=table,
            fa_version=3,
            **scales,
        )

    return graph_milliseconds([prepare() for _ in range(copies_beyond_l2(cache_bytes))])


def vllm_turboquant(batch: int, context: int, num_heads: int, num_kv_heads: int, head_dim: int) -> float:
    """Milliseconds of the decode kernel behind vLLM's own `turboquant_4bit_nc`."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    config, splits = TurboQuantConfig.from_cache_dtype("turboquant_4bit_nc", head_dim), 32
    lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    query = torch.randn(batch, num_heads, head_dim, device="cuda", dtype=torch.bfloat16)
    rotation = torch.eye(head_dim, device="cuda")
    centroids = get_centroids(head_dim, config.centroid_bits).cuda().float()
    middle = torch.empty(batch, num_heads, splits, head_dim + 1, device="cuda")
    out, lse = torch.empty_like(query), torch.empty(batch, num_heads, device="cuda")

    def prepare() -> Callable[[], object]:
        table = shuffled_table(batch, context)
        shape = (table.numel(), BLOCK_SIZE, num_kv_heads, config.slot_size_aligned)
        cache = torch.randint(0, 100, shape, device="cuda").to(torch.uint8)
        return lambda: triton_turboquant_decode_attention(
            query,
            cache,
            table,
            lengths,
            rotation,
            centroids,
            head_dim**-0.5,
            config.key_mse_bits,
            config.key_packed_size,
            config.effective_value_quant_bits,
            config.key_fp8,
            config.norm_correction,
            PiT=rotation,
            mid_o_buf=middle,
            output_buf=out,
            lse_buf=lse,
            max_num_kv_splits=splits,
        )

    return graph_milliseconds([prepare()], replays=5)


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the device, read and written bytes counted."""
    # A kernel's copy: a graph hands a plain one to the copy engines, which are slower.
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (graph_milliseconds([lambda: torch.neg(source, out=target)]) * 1e-3)
