"""What differs between the versions of vLLM."""

import gc
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import vllm
from packaging.version import Version

# The bounds that pyproject.toml asks for.
OLDEST = Version("0.29.0")
TESTED = ("0.29", "0.31", "0.32", "0.33")


def check_version() -> None:
    """Refuse a vLLM without the hooks that the backend needs; warn about one that is newer than those tested.

    Raises:
        RuntimeError: If it is older than `OLDEST`.
    """
    found = Version(vllm.__version__)
    if Version(found.base_version) < OLDEST:
        raise RuntimeError(
            f"turboquant-vllm needs vLLM {OLDEST} or newer, which lets a backend shrink its pages; this is "
            f"{vllm.__version__}. Upgrade vLLM, or uninstall turboquant-vllm to serve uncompressed."
        )
    if f"{found.major}.{found.minor}" not in TESTED:
        warnings.warn(
            f"turboquant-vllm was tested with vLLM {', '.join(TESTED)}; this is {vllm.__version__}", stacklevel=2
        )


def register_backends(custom: str, cpu: str) -> None:
    """Put class paths in vLLM's registry.

    vLLM ignores the choice of a backend on CPUs and takes the class in the slot CPU_ATTN, whatever it is.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, custom)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, cpu)


def register_kv_cache_dtypes(names: Iterable[str]) -> None:
    """Let vLLM 0.33 and newer take these for `--kv-cache-dtype`; older versions refuse them when they parse it."""
    from vllm.config import cache

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
        from vllm.v1.kv_cache_interface import KVQuantMode

        return KVQuantMode.CUSTOM


def model_with(layers: Iterable[Any], model_config: Any) -> Any:
    """The model that `model_config` describes and that has one of these layers, or None.

    vLLM hands its models to no backend, so it is looked for among all objects of the process.
    """
    from vllm.model_executor.model_loader import get_model_cls

    kind, wanted = get_model_cls(model_config), set(layers)
    models = (found for found in gc.get_objects() if issubclass(type(found), kind))
    return next((model for model in models if not wanted.isdisjoint(model.modules())), None)


def position_rows(model_config: Any) -> int:
    """How many positions the model takes for every token, beside each other; 0 where it takes one as it is."""
    if model_config.uses_mrope:
        return 3
    # Of vLLM before 0.30 or so.
    return int(getattr(model_config, "uses_xdrope_dim", 0))


def current_config() -> Any:
    """The configuration of the engine that is being built or run in this context, or None."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()


def use_config(config: Any) -> AbstractContextManager[Any]:
    """Have what is built in this context find the configuration of its engine."""
    from vllm.config import set_current_vllm_config

    return set_current_vllm_config(config)


def own_backend() -> Any:
    """The backend of vLLM's for layers that stay uncompressed."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    return FlashAttentionBackend
