"""Functions that torch.compile takes as single operations while it traces a model.

Whoever is not traced calls the functions themselves: going through torch's dispatcher costs the host more than a
layer's whole call.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from turboquant_core import TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_core.scale import ScaleRule
from turboquant_hf.storage.codec import LayerCodec

_CODEC = (
    "Tensor?[] key_transform, Tensor? key_order, Tensor? value_order, int head_dim, float key_bits, float value_bits, "
    "str key_scale, str value_scale, bool key_split, int? value_head_dim"
)
_NUM_PARTS = len(_CODEC.split(", "))
Codec = tuple[
    Sequence[torch.Tensor | None],
    torch.Tensor | None,
    torch.Tensor | None,
    int,
    float,
    float,
    ScaleRule,
    ScaleRule,
    bool,
    int | None,
]
_library = torch.library.Library("turboquant_hf", "DEF")  # type: ignore[no-untyped-call]


def operation(schema: str, function: Callable[..., Any], shapes: Callable[..., Any]) -> Callable[..., Any]:
    """What calls a function as a single operation.

    Args:
        schema: Of the operation. CODEC stands for a `LayerCodec`, which comes last.
        function: Takes arguments by position.
        shapes: Gives, for the same arguments, empty tensors like those that the function gives.
    """
    name = schema.partition("(")[0]
    takes_codec = "CODEC" in schema
    _library.define(schema.replace("CODEC", _CODEC))  # type: ignore[no-untyped-call]
    run, fake = (_unpacking(each) if takes_codec else each for each in (function, shapes))
    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"turboquant_hf::{name}", fake, lib=_library)
    called = getattr(torch.ops.turboquant_hf, name)

    def call(*arguments: Any) -> Any:
        return called(*arguments[:-1], *_pack(arguments[-1])) if takes_codec else called(*arguments)

    return call


def _unpacking(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a codec, as one of what `_pack` makes of it."""

    def unpacking(*arguments: Any) -> Any:
        return function(*arguments[:-_NUM_PARTS], _unpack(arguments[-_NUM_PARTS:]))

    return unpacking


def _pack(codec: LayerCodec) -> Codec:
    config = codec.config
    return (
        codec.key_transform.parts,
        codec.key_order,
        codec.value_order,
        config.head_dim,
        float(config.key_bits),
        float(config.value_bits),
        config.key_scale,
        config.value_scale,
        config.key_split,
        config.value_head_dim,
    )


def _unpack(codec: Codec) -> LayerCodec:
    key_parts, key_order, value_order, head_dim, key_bits, value_bits, key_scale, value_scale, split, value_dim = codec
    config = TurboQuantConfig(
        head_dim, key_bits, value_bits, key_scale, value_scale, key_split=split, value_head_dim=value_dim
    )
    return LayerCodec(config, KeyTransform.of_parts(*key_parts), key_order, value_order)
