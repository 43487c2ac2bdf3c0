"""Which versions of vLLM are served."""

import warnings

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
