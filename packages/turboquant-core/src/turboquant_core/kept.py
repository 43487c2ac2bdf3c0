"""Tensors that are made once and kept."""

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, TypeVar, cast

import torch
from torch.utils._python_dispatch import _disable_current_modes

P = ParamSpec("P")
T = TypeVar("T")


def kept(function: Callable[P, T]) -> Callable[P, T]:
    """Remember what a function of hashable arguments makes: tensors that serve everywhere, whoever asks first.

    Made in inference mode they could be used in it alone, and made while PyTorch exports a model they would be fakes.
    """

    @wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> T:
        # What Dynamo traces becomes part of a graph.
        if torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(Callable[P, T], cache(made))
