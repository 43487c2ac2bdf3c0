"""Tensors that outlive `torch.inference_mode()`."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def outside_inference_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Have a function make tensors that can be written anywhere: those made in inference mode only can be in it."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        # What is compiled writes to tensors that there are already.
        if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call
