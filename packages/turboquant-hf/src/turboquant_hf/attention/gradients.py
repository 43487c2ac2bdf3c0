"""Gradients end at stored keys and values: a backward pass that would need them is told so."""

from typing import Any

import torch

from turboquant_hf.storage.traced import operation


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
        return None, _refuse_when_run(gradients[0])


def _refuse(gradient: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(
        "backward() needs the gradient of keys and values that TurboQuantCache stores as codes, which have none: what "
        "makes them, such as k_proj and v_proj, would learn nothing. Train without a cache (use_cache=False), with a "
        "DynamicCache, or with everything in the cache's first call; for a prefix that is not trained, freeze what "
        "makes keys and values. To run forward only, use torch.no_grad()."
    )


# Not when a graph is traced.
_refuse_when_run = operation(
    "refuse_gradient(Tensor gradient) -> Tensor", _refuse, lambda gradient: gradient.new_empty(())
)
