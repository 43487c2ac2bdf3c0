"""What `update` hands over to attention in place of keys and values.

A model's attention calls `update` of the cache and then the attention function, which is given what `update` returned
and not the cache. So a layer that is to be read as codes returns a placeholder for keys and values: a tensor of their
shape that says what it stands for, and that nothing but `turboquant_attention` can read. A model that computes with
keys or values in between is told so at its first token.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from types import FrameType
from typing import Any, ClassVar, NamedTuple

import torch

from turboquant_hf._compat import PreTrainedConfig
from turboquant_hf.attention.dispatch import ATTENTION, other_attention
from turboquant_hf.storage.store import Store

_PROPERTIES = (
    "_base",
    "device",
    "dtype",
    "grad",
    "grad_fn",
    "is_cuda",
    "is_leaf",
    "is_meta",
    "is_mkldnn",
    "is_nested",
    "is_quantized",
    "is_sparse",
    "layout",
    "ndim",
    "requires_grad",
    "shape",
)
_METHODS = (
    "__hash__",
    "__len__",
    "__repr__",
    "_is_view",
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_conj",
    "is_contiguous",
    "is_floating_point",
    "is_neg",
    "numel",
    "size",
    "storage_offset",
    "stride",
    "untyped_storage",
)


class Prompt(NamedTuple):
    """The first tokens: they attend on themselves as they are.

    Attributes:
        keys: [batch_size, num_kv_heads, num_tokens, head_dim].
        values: The same for values.
        store_again: Called with keys, values and starts int32 [batch_size] if rows begin with padding, which `update`
            cannot know.
        room: Tokens that a mask may be of: all that a static cache has room for.
    """

    keys: torch.Tensor
    values: torch.Tensor
    store_again: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
    room: int


class Stored(NamedTuple):
    """Later tokens: they attend on what is stored.

    Attributes:
        store: What is stored, theirs included.
        recent: What `Store.append_parts` gave.
        wants_gradient: Whether a backward pass would need the gradient of what is stored.
    """

    store: Store
    recent: tuple[torch.Tensor, torch.Tensor] | None
    wants_gradient: bool = False


class Placeholder(torch.Tensor):
    """NaN in the shape of keys and values, which can be asked what it is like and not computed with.

    Attributes:
        given: What it stands for.
    """

    given: Prompt | Stored

    # What a tensor is like, as models ask, and torch.compile of one that comes into a graph.
    _ASKED: ClassVar[frozenset[Any]] = frozenset(
        [getattr(torch.Tensor, name).__get__ for name in _PROPERTIES]
        + [getattr(torch.Tensor, name) for name in _METHODS]
    )
    # What leaves a tensor as it is, of the same type and on the same device.
    _MOVED: ClassVar[frozenset[Any]] = frozenset(
        {torch.Tensor.contiguous, torch.Tensor.detach, torch.Tensor.to, torch.Tensor.type_as}
    )

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in cls._ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in cls._MOVED and isinstance(args[0], cls):
            held = args[0]
            like = torch.empty(0, dtype=held.dtype, device=held.device)
            moved = func(like, *args[1:], **kwargs)
            if moved.dtype == like.dtype and moved.device == like.device:
                return held
        # A property's getter is called __get__.
        named = getattr(func, "__self__", func) if getattr(func, "__name__", "") == "__get__" else func
        raise _refusal(
            next(_modules_at_work(), None), f"calls {getattr(named, '__name__', named)} on the keys or values"
        )


def hand_over(
    given: Prompt | Stored, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """A placeholder of that shape, for keys and for values."""
    # torch.compile would warn of the cache.
    make = _not_a_number.__wrapped__ if torch.compiler.is_compiling() else _not_a_number
    placeholder = make(dtype, device).expand(shape).as_subclass(Placeholder)
    placeholder.given = given
    return placeholder, placeholder


@lru_cache
def _not_a_number(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaN, [1]."""
    return torch.full((1,), torch.nan, dtype=dtype, device=device)


def is_still_to_be_read(states: torch.Tensor) -> bool:
    """Whether what `update` gives stands for what is stored, which attention reads after it."""
    return isinstance(states, Placeholder) and isinstance(states.given, Stored)


def taken_over(module: torch.nn.Module, key: torch.Tensor, value: torch.Tensor) -> Prompt | Stored | None:
    """What the keys and values that a model's attention passes on stand for; None if they are no placeholders.

    Raises:
        RuntimeError: If only one of them is what `update` handed over.
    """
    if isinstance(key, Placeholder):
        if value is key:
            return key.given
        raise _refusal(module, "changes the values")
    if isinstance(value, Placeholder):
        raise _refusal(module, "changes the keys")
    return None


def _refusal(module: torch.nn.Module | None, what: str) -> RuntimeError:
    who = "This model" if module is None else type(module).__name__
    configs = (getattr(each, "config", None) for each in (module, *_modules_at_work()))
    config = next((each for each in configs if isinstance(each, PreTrainedConfig)), None)
    whose = "" if config is None else f", which this {config.model_type} model does not"
    return RuntimeError(
        f'{who} {what} that TurboQuantCache hands over. With attn_implementation="{ATTENTION}" they are codes, and a '
        f"model has to pass them on to attention as they are{whose}. {other_attention(config)}"
    )


def _modules_at_work() -> Iterator[torch.nn.Module]:
    """The modules that are running, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        module = frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module):
            yield module
        frame = frame.f_back
