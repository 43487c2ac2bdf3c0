"""What torch.compile takes as single operations while it traces a model: `page_ops`, and what masks are asked.

Whoever is not traced calls the functions themselves: going through torch's dispatcher costs the host more than a
layer's whole call.
"""

from collections.abc import Callable, Sequence

import torch

from turboquant_core import TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_core.scale import ScaleRule
from turboquant_hf.storage import page_ops
from turboquant_hf.storage.codec import LayerCodec

_CODEC = (
    "Tensor?[] key_transform, Tensor? key_order, Tensor? value_order, int head_dim, float key_bits, float value_bits, "
    "str key_scale, str value_scale"
)
Codec = tuple[
    Sequence[torch.Tensor | None], torch.Tensor | None, torch.Tensor | None, int, float, float, ScaleRule, ScaleRule
]


def write(
    pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, codec: LayerCodec
) -> None:
    """See `page_ops.write`."""
    torch.ops.turboquant_hf.write(pages, keys, values, slots, *_pack(codec))


def read(pages: torch.Tensor, count: int, codec: LayerCodec, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """See `page_ops.read`."""
    keys, values = torch.ops.turboquant_hf.read(pages, count, dtype, *_pack(codec))
    return keys, values


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    codec: LayerCodec,
    *,
    scale: float | None,
    seq_starts: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `page_ops.attend`."""
    options = (scale, seq_starts, window, softcap, sinks, return_lse)
    output, lse = torch.ops.turboquant_hf.attend(query, pages, block_table, seq_lens, *options, *_pack(codec))
    return output, lse


def first_seen(mask: torch.Tensor) -> torch.Tensor:
    """The first token that is seen, int64 [batch_size], of a mask bool [batch_size, num_tokens]; 0 where none is.

    Inductor on a GPU, as of torch 2.11, cannot schedule a reduction of what it computes from this one: it takes over
    this one's ranges, which are a single element for one row. An operation of its own is left alone.
    """
    if torch.compiler.is_compiling():
        first: torch.Tensor = torch.ops.turboquant_hf.first_seen(mask)
        return first
    return _first_seen(mask)


def refuse_gradient(gradient: torch.Tensor) -> torch.Tensor:
    """Raise RuntimeError, when it runs and not when a graph is traced."""
    refused: torch.Tensor = torch.ops.turboquant_hf.refuse_gradient(gradient)
    return refused


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
    )


def _unpack(codec: Codec) -> LayerCodec:
    key_parts, key_order, value_order, head_dim, key_bits, value_bits, key_scale, value_scale = codec
    config = TurboQuantConfig(head_dim, key_bits, value_bits, key_scale, value_scale)
    return LayerCodec(config, KeyTransform.of_parts(*key_parts), key_order, value_order)


def _write(pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, *codec: *Codec) -> None:
    page_ops.write(pages, keys, values, slots, _unpack(codec))


def _read(pages: torch.Tensor, count: int, dtype: torch.dtype, *codec: *Codec) -> tuple[torch.Tensor, torch.Tensor]:
    return page_ops.read(pages, count, _unpack(codec), dtype)


def _read_shapes(
    pages: torch.Tensor, count: int, dtype: torch.dtype, *codec: *Codec
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (pages.shape[1], count * page_ops.BLOCK_SIZE, codec[3])
    return pages.new_empty(shape, dtype=dtype), pages.new_empty(shape, dtype=dtype)


def _attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float | None,
    seq_starts: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
    *codec: *Codec,
) -> tuple[torch.Tensor, torch.Tensor]:
    return page_ops.attend(
        query,
        pages,
        block_table,
        seq_lens,
        _unpack(codec),
        scale=scale,
        seq_starts=seq_starts,
        window=window,
        softcap=softcap,
        sinks=sinks,
        return_lse=return_lse,
    )


def _attend_shapes(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float | None,
    seq_starts: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
    *codec: *Codec,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch_size, num_heads, query_len, head_dim = query.shape
    output = query.new_empty(batch_size, query_len, num_heads, head_dim)
    lse = (batch_size, query_len, num_heads) if return_lse else (0,)
    return output, query.new_empty(lse, dtype=torch.float32)


def _first_seen(mask: torch.Tensor) -> torch.Tensor:
    return mask.byte().argmax(-1)


def _first_seen_shape(mask: torch.Tensor) -> torch.Tensor:
    return mask.new_empty(len(mask), dtype=torch.int64)


def _refuse_gradient(gradient: torch.Tensor) -> torch.Tensor:
    raise RuntimeError(
        "backward() needs the gradient of keys and values that TurboQuantCache stores as codes, which have none: what "
        "makes them, such as k_proj and v_proj, would learn nothing. Train without a cache (use_cache=False), with a "
        "DynamicCache, or with everything in the cache's first call; for a prefix that is not trained, freeze what "
        "makes keys and values. To run forward only, use torch.no_grad()."
    )


def _refuse_gradient_shape(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.new_empty(())


_library = torch.library.Library("turboquant_hf", "DEF")  # type: ignore[no-untyped-call]


def _register(schema: str, function: Callable[..., object], shapes: Callable[..., object]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema.replace("CODEC", _CODEC))  # type: ignore[no-untyped-call]
    _library.impl(name, function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"turboquant_hf::{name}", shapes, lib=_library)


_register("write(Tensor(a!) pages, Tensor keys, Tensor values, Tensor slots, CODEC) -> ()", _write, lambda *_: None)
_register("read(Tensor pages, int count, ScalarType dtype, CODEC) -> (Tensor, Tensor)", _read, _read_shapes)
_register(
    "attend(Tensor query, Tensor pages, Tensor block_table, Tensor seq_lens, float? scale, Tensor? seq_starts, "
    "int? window, float? softcap, Tensor? sinks, bool return_lse, CODEC) -> (Tensor, Tensor)",
    _attend,
    _attend_shapes,
)
_register("first_seen(Tensor mask) -> Tensor", _first_seen, _first_seen_shape)
_register("refuse_gradient(Tensor gradient) -> Tensor", _refuse_gradient, _refuse_gradient_shape)
