"""What of an engine and of a layer is refused, each with its remedy.

vLLM asks for an engine's on GPUs, through `supports_combination`; on CPUs it asks nothing, and every layer does.
"""

from collections.abc import Iterator
from typing import Any

from turboquant_core.vllm_limits import BLOCK_SIZE_MULTIPLE, HEAD_DIMS
from turboquant_vllm._compat.engine import is_batch_invariant
from turboquant_vllm.settings import SERVED_PRESETS, Settings

KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", *SERVED_PRESETS)
INSTEAD = "Leave --attention-backend out to serve this model uncompressed."
# Connectors that may keep pages in the memory of this machine: the option that says where, and what it says then.
OFFLOADING = {
    "OffloadingConnector": ("spec_name", "CPUOffloadingSpec"),
    "SimpleCPUOffloadConnector": ("kv_offload_backend", "cpu"),
}
# It takes the type and the size of a slot from the configuration of the model (LMCache 0.5.6), not from the pages.
LMCACHE_IN_PROCESS = "LMCacheConnectorV1"
MEANS_INSTEAD = (
    'Write the means to a file with `turboquant calibrate MODEL --out FILE` and give it as "calibration", or give '
    '"center_keys": false.'
)
OWN_DRAFT_BACKEND = "Leave attention_backend out of --speculative-config: vLLM's own backend then serves the draft."


def engine_problems(config: Any, settings: Settings) -> list[str]:
    """Why an engine of this configuration is refused; empty if it is not, or if there is none."""
    if config is None:
        return []
    return [
        *_cache_problems(config.cache_config),
        *_attention_problems(config),
        *_copy_problems(config, settings),
        *_connector_problems(config.kv_transfer_config),
        *_mean_problems(config, settings),
        *_layer_problems(config, settings),
    ]


def check_layer(
    *,
    head_size: int,
    kv_cache_dtype: str,
    attn_type: str,
    alibi_slopes: object,
    extra: dict[str, object],
) -> None:
    """Refuse a layer that would be attended wrongly: on CPUs vLLM does not ask the hooks.

    Raises:
        ValueError: Naming what is not supported and what serves instead.
    """
    if head_size not in HEAD_DIMS:
        raise ValueError(f"head_size is {head_size}; TurboQuant serves {', '.join(map(str, HEAD_DIMS))}. {INSTEAD}")
    if kv_cache_dtype not in KV_CACHE_DTYPES:
        raise ValueError(
            f"kv_cache_dtype is {kv_cache_dtype}; TurboQuant takes {', '.join(KV_CACHE_DTYPES)}: the bits of the cache "
            'are set with --additional-config \'{"turboquant": {"preset": "tq4"}}\'.'
        )
    if attn_type != "decoder":
        raise ValueError(f"attn_type is {attn_type}; TurboQuant serves decoder attention. {INSTEAD}")
    if alibi_slopes is not None:
        raise ValueError(f"ALiBi is not supported by TurboQuant. {INSTEAD}")
    for name, value in extra.items():
        if value is not None and value != -1:
            raise ValueError(f"a layer with {name}={value!r} is not supported by TurboQuant. {INSTEAD}")


def reads_only_own_pages(transfer: Any) -> bool:
    """Whether a connector (a configuration, or None) gives every process back the pages that it filled, and no others.

    Offloading to the CPU's memory does; what it moves is gone with the process.
    """
    if transfer is None or transfer.kv_connector is None:
        return True
    option, value = OFFLOADING.get(transfer.kv_connector, (None, None))
    return option is not None and transfer.get_from_extra_config(option, value) == value


def _cache_problems(cache: Any) -> Iterator[str]:
    if cache.user_specified_block_size and cache.block_size % BLOCK_SIZE_MULTIPLE:
        yield (
            f"block_size is {cache.block_size}; TurboQuant takes multiples of {BLOCK_SIZE_MULTIPLE}. "
            "Leave --block-size out, or give one of those."
        )


def _attention_problems(config: Any) -> Iterator[str]:
    model, parallel, speculative = config.model_config, config.parallel_config, config.speculative_config
    if model is not None and model.is_mm_prefix_lm:
        yield (
            f"in {model.hf_config.model_type} the tokens of an image see those that follow them, and TurboQuant "
            f"attends causally. Give --language-model-only to serve text alone. {INSTEAD}"
        )
    if model is not None and model.rswa_window is not None:
        yield f"reference sliding windows (rswa_window={model.rswa_window}) are not supported by TurboQuant. {INSTEAD}"
    if config.attention_config.use_non_causal:
        yield f"use_non_causal is set, and TurboQuant attends causally. {INSTEAD}"
    if is_batch_invariant():
        yield "TurboQuant's results vary with the batch by rounding. Unset VLLM_BATCH_INVARIANT."
    if config.cache_config.kv_sharing_fast_prefill:
        yield "kv_sharing_fast_prefill is set, which TurboQuant does not serve. Leave --kv-sharing-fast-prefill out."
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(parallel, name)) > 1:
            yield f"{name} is {size}; TurboQuant serves 1. Use tensor or pipeline parallelism."
    if speculative is not None and speculative.enable_adaptive_verification:
        yield "adaptive verification is not supported by TurboQuant. Leave it out of --speculative-config."
    # For these vLLM lengthens the rows and leaves the lengths on the CPU, which prefill is planned with, as they were.
    if _compresses_draft(speculative) and (speculative.method == "draft_model" or speculative.parallel_drafting):
        yield f"a draft of method {speculative.method} is not served by TurboQuant. {OWN_DRAFT_BACKEND}"


def _copy_problems(config: Any, settings: Settings) -> Iterator[str]:
    # Halves of a batch that run at the same time would write each other's copies.
    if settings.keeps_copies and config.parallel_config.use_ubatching:
        yield (
            "batches are cut into microbatches that overlap, by --enable-dbo or --ubatch-size, and those cannot share "
            'raw copies of tokens. Leave it out, or give "sink_tokens": 0 and "recent_tokens": 0.'
        )


def _connector_problems(transfer: Any) -> Iterator[str]:
    if transfer is None:
        return
    inner = transfer.get_from_extra_config("connectors", [])
    for name in (transfer.kv_connector, *(connector.get("kv_connector") for connector in inner)):
        if name is not None and name.startswith(LMCACHE_IN_PROCESS):
            yield (
                f"kv_connector is {name}, which copies slots of the size that the model's uncompressed keys and values "
                "have, and the pages hold smaller ones. Start LMCache as a server and give LMCacheMPConnector instead."
            )


def _mean_problems(config: Any, settings: Settings) -> Iterator[str]:
    if not settings.center_keys:
        return
    transfer, speculative = config.kv_transfer_config, config.speculative_config
    if settings.calibration is None:
        if not reads_only_own_pages(transfer):
            yield (
                f"the pages that {transfer.kv_connector} hands to another process hold keys less means that this one "
                "took itself. Write the means to a file with `turboquant calibrate MODEL --out FILE` and give it to "
                'both sides with --additional-config \'{"turboquant": {"calibration": "FILE"}}\', or give both '
                '"center_keys": false there.'
            )
        if config.parallel_config.pipeline_parallel_size > 1 and config.cache_config.kv_cache_dtype_skip_layers:
            yield (
                "pipeline_parallel_size is above 1 and kv_cache_dtype_skip_layers is set: a stage without a compressed "
                f"layer would not help to take the key means at start. {MEANS_INSTEAD}"
            )
    elif _compresses_draft(speculative):
        yield f"calibration is {settings.calibration}, which holds no means of the draft model. {OWN_DRAFT_BACKEND}"


def _layer_problems(config: Any, settings: Settings) -> Iterator[str]:
    skipped, transfer = config.cache_config.kv_cache_dtype_skip_layers, config.kv_transfer_config
    unlike = {
        f"layer_bits is {settings.layer_bits}": settings.layer_bits is not None,
        f"kv_cache_dtype_skip_layers is {', '.join(skipped)}": bool(skipped),
    }
    for found in (what for what, is_so in unlike.items() if is_so):
        if transfer is not None and transfer.kv_connector is not None:
            yield (
                f"{found}, and {transfer.kv_connector} was not tried with pages whose size differs between layers. "
                "Leave one of them out."
            )
    if settings.layer_bits is not None and _compresses_draft(config.speculative_config):
        yield f"layer_bits is {settings.layer_bits}, which holds no bits of the draft model. {OWN_DRAFT_BACKEND}"


def _compresses_draft(speculative: Any) -> bool:
    """Whether a draft model was asked to use the backend too: it has its own choice, which is vLLM's unless given."""
    return speculative is not None and getattr(speculative.attention_backend, "name", None) == "CUSTOM"
