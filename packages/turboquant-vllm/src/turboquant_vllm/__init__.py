"""TurboQuant for vLLM: an attention backend that keeps keys and values as codes and attends on the codes."""

from importlib.metadata import version

__version__ = version("turboquant-vllm")

__all__ = ["register"]


def register() -> None:
    """Make the backend known to vLLM as CUSTOM; vLLM calls this in each of its processes.

    It is used where `--attention-backend CUSTOM` asks for it, and nothing changes otherwise.

    Raises:
        RuntimeError: If this version of vLLM has no hook for smaller pages.
    """
    from turboquant_vllm._compat.versions import check_version

    check_version()
    from turboquant_vllm._compat import registry
    from turboquant_vllm.settings import SERVED_PRESETS

    registry.register_kv_cache_dtypes(SERVED_PRESETS)
    registry.register_backends(
        custom="turboquant_vllm.backend.TurboQuantBackend", cpu="turboquant_vllm.cpu_backend.SelectedBackend"
    )
