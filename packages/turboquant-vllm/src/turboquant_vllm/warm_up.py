"""Compile kernels at start, before vLLM begins to watch for compilations that requests wait for."""

from typing import TYPE_CHECKING, Any

import torch

from turboquant_core import KVCacheLayout
from turboquant_core.warm_up import warm_up as warm_up_ops
from turboquant_vllm._compat.engine import all_layers
from turboquant_vllm._compat.interface import init_logger
from turboquant_vllm.batch.prefill_rows import GROUP_COUNTS, PrefillRows
from turboquant_vllm.prefill.attention import Prefill
from turboquant_vllm.raw_copies import copy_columns
from turboquant_vllm.settings import Settings

if TYPE_CHECKING:
    from turboquant_vllm.impl import TurboQuantImpl

logger = init_logger(__name__)
# A context of one token, and as many new ones as decode attention does not take.
CONTEXT_LEN, QUERY_LEN = 1, 9


def warm_up(
    kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, max_query_len: int, device: torch.device
) -> None:
    """Launch what the layers of one group launch: decode rows of up to max_query_len tokens, and prefill."""
    layers = all_layers(vllm_config)
    max_batch = vllm_config.scheduler_config.max_num_seqs
    max_blocks = -(-vllm_config.model_config.max_model_len // kv_cache_spec.block_size)
    dtype = vllm_config.model_config.dtype
    unlike: dict[Any, TurboQuantImpl] = {}
    for name in layer_names:
        impl = layers[name].impl
        transformed = frozenset(impl.key_transform.settled.tensors())
        unlike.setdefault((impl.config, impl.num_heads, impl.dense_attention, impl.sinks is None, transformed), impl)
    settings = Settings.of_engine(vllm_config)
    columns = copy_columns(vllm_config, settings) if settings.keeps_copies else None
    logger.info_once("TurboQuant compiles its kernels.")
    for impl in unlike.values():
        layout = KVCacheLayout(impl.config, impl.num_kv_heads, kv_cache_spec.block_size)
        warm_up_ops(
            layout,
            num_heads=impl.num_heads,
            dtype=dtype,
            device=device,
            max_batch=max_batch,
            max_blocks=max_blocks,
            max_query_len=max_query_len,
            window=impl.sliding_window,
            softcap=impl.softcap,
            has_sinks=impl.sinks is not None,
            key_transform=impl.key_transform.settled,
            copies=columns,
        )
        # Rows are padded to powers of two.
        for exponent in range(max_batch.bit_length() + 1):
            _prefill(impl, layout, min(2**exponent, max_batch), 0, dtype, device)
        for count in GROUP_COUNTS if impl.sliding_window is None else ():
            _prefill(impl, layout, (count - 1) // 2, QUERY_LEN, dtype, device)


def _prefill(
    impl: "TurboQuantImpl",
    layout: KVCacheLayout,
    num_rows: int,
    most_grouped_tokens: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Prefill rows with a context each."""
    num_tokens = num_rows * QUERY_LEN
    query = torch.zeros(num_tokens, impl.num_heads, impl.head_size, dtype=dtype, device=device)
    key = torch.zeros(num_tokens, impl.num_kv_heads, impl.head_size, dtype=dtype, device=device)
    rows = PrefillRows(
        num_tokens=num_tokens,
        max_query_len=QUERY_LEN,
        query_start_loc=torch.arange(num_rows + 1, dtype=torch.int32, device=device) * QUERY_LEN,
        context_lens=torch.full((num_rows,), CONTEXT_LEN, dtype=torch.int32, device=device),
        context_lens_cpu=[CONTEXT_LEN] * num_rows,
        query_lens_cpu=[QUERY_LEN] * num_rows,
        block_table=torch.zeros(num_rows, 1, dtype=torch.int32, device=device),
        most_grouped_tokens=most_grouped_tokens,
    )
    pages = torch.zeros(1, layout.num_kv_heads, layout.head_bytes, dtype=torch.uint8, device=device)
    prefill = Prefill(impl.dense_attention, layout, impl.sinks)
    prefill(query, (key, key), pages, rows, impl.key_transform.settled, torch.empty_like(query))
