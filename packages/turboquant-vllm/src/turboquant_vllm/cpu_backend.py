"""What vLLM finds in the slot of its CPU backend: its own class, unless CUSTOM was asked for."""

from typing import Any

from turboquant_vllm._compat.engine import current_config
from turboquant_vllm._compat.registry import is_chosen, own_backend


def __getattr__(name: str) -> Any:
    if name != "SelectedBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not is_chosen(current_config()):
        return own_backend()
    from turboquant_vllm.backend import TurboQuantBackend

    return TurboQuantBackend
