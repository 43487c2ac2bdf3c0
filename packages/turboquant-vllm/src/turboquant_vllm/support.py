"""What the backend can serve, asked by vLLM's `supports_*` hooks and by every layer."""

import torch

from turboquant_core.vllm_limits import HEAD_DIMS
from turboquant_vllm.settings import PRESETS

# float32 is for CPUs; FlashAttention takes the others.
DTYPES = (torch.float16, torch.bfloat16)
CPU_DTYPES = (*DTYPES, torch.float32)
KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", *PRESETS)
INSTEAD = "Leave --attention-backend out to serve this model uncompressed."


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
