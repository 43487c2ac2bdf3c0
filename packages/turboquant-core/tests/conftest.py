import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

# The matrices are small: threads only wait for each other, for seconds on a busy machine.
for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")


@pytest.fixture(autouse=True)
def unwritten_memory_is_poison() -> Iterator[None]:
    """`torch.empty` gives NaN, and bytes of 0xFF: what nobody has written is seen where it is read.

    Not on a GPU, where it would change which kernels run.
    """
    import torch

    torch.use_deterministic_algorithms(not torch.cuda.is_available(), warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def run_python() -> Callable[[str], str]:
    """Runs code in a fresh interpreter and returns what it printed."""

    def run(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
