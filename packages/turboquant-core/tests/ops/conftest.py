import os
from importlib.util import find_spec

import pytest
import torch

# Triton reads this once, when a kernel is decorated: without a GPU its interpreter runs the same cases on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# There is no Triton for this system.
if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def looks_for_gluon():
    """Has the operations look for Gluon in this test, and again after it."""
    from turboquant_core.ops._dispatch import has_gluon

    has_gluon.cache_clear()
    yield
    has_gluon.cache_clear()
