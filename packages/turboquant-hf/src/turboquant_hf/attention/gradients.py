"""Gradients end at stored keys and values: a backward pass that would need them is told so."""

from typing import Any

import torch

from turboquant_hf.storage import traced


def without_gradient(states: torch.Tensor) -> torch.Tensor:
    """The same states, from which nobody can go backward.

    Raises:
        RuntimeError: In a backward pass that comes here.
    """
    # What requires a gradient is what makes autograd come by.
    anchor = torch.zeros((), requires_grad=True)
    result: torch.Tensor = _WithoutGradient.apply(states.detach(), anchor)  # type: ignore[no-untyped-call]
    return result


class _WithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, traced.refuse_gradient(gradients[0])
