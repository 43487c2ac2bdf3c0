"""TurboQuant for vLLM: not yet an attention backend."""

from importlib.metadata import version
from typing import NoReturn

__version__ = version("turboquant-vllm")

__all__ = ["register"]


def register() -> NoReturn:
    """Register the attention backend with vLLM, once there is one.

    No entry point calls this yet, so that an installed turboquant-vllm changes nothing in vLLM.

    Raises:
        NotImplementedError: Always.
    """
    raise NotImplementedError(
        f"turboquant-vllm {__version__} has no attention backend yet, so vLLM's --attention-backend CUSTOM cannot "
        "serve from it. Leave the flag out to serve uncompressed, or use turboquant-hf with transformers."
    )
