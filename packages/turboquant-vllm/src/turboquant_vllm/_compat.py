"""What differs between the versions of vLLM."""

import warnings
from typing import Any

import vllm
from packaging.version import Version

OLDEST = Version("0.29.0")
TESTED = ("0.32",)


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


def current_config() -> Any:
    """The configuration of the engine that is being built or run in this context, or None."""
    from vllm.config import get_current_vllm_config_or_none

    return get_current_vllm_config_or_none()
