"""vLLM's registries: of backends, and of types of the cache."""

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import cache
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVQuantMode


def register_backends(custom: str, cpu: str) -> None:
    """Put class paths in vLLM's registry.

    vLLM ignores the choice of a backend on CPUs and takes the class in the slot CPU_ATTN, whatever it is.
    """
    register_backend(AttentionBackendEnum.CUSTOM, custom)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, cpu)


def register_kv_cache_dtypes(names: Iterable[str]) -> None:
    """Let vLLM 0.33 and newer take these for `--kv-cache-dtype`; older versions refuse them when they parse it."""
    register = getattr(cache, "register_kv_cache_dtype", None)
    if register is None:
        return
    for name in names:
        if name not in cache.KV_CACHE_DTYPES:
            register(name)(type(f"{name}_handler", (_Bytes,), {"name": name}))


class _Bytes:
    """What vLLM asks of a type of its own for the cache."""

    def torch_dtype(self) -> torch.dtype:
        """Pages are bytes."""
        return torch.uint8

    def quant_mode(self) -> Any:
        """No kernel of vLLM's reads them."""
        return KVQuantMode.CUSTOM


def is_chosen(config: Any) -> bool:
    """Whether an engine of this configuration, or None, was asked to use the backend in the slot CUSTOM."""
    return config is not None and config.attention_config.backend == AttentionBackendEnum.CUSTOM


def own_backend() -> Any:
    """The backend of vLLM's for layers that stay uncompressed."""
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    return FlashAttentionBackend
