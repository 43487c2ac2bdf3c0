import os

import pytest
import torch

# Triton reads this once, when a kernel is decorated: without a GPU its interpreter runs the same cases on the CPU.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
