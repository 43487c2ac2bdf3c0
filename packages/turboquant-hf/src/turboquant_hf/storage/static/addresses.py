"""Tensors that keep their addresses, for CUDA graphs."""

from collections.abc import Sequence

import torch


def keep_addresses(*tensors: torch.Tensor) -> None:
    """Let CUDA graphs read and write these tensors where they are."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def copy_into(held: Sequence[torch.Tensor], new: Sequence[torch.Tensor]) -> None:
    """Write what is new over what is held."""
    for tensor, source in zip(held, new, strict=True):
        tensor.copy_(source)
