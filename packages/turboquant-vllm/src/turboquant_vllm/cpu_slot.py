"""What vLLM finds in the slot of its CPU backend: its own class, unless CUSTOM was asked for."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name != "SelectedBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from turboquant_vllm._compat import current_config

    config = current_config()
    if config is not None and config.attention_config.backend == AttentionBackendEnum.CUSTOM:
        from turboquant_vllm.backend import TurboQuantBackend

        return TurboQuantBackend
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    return CPUAttentionBackend
