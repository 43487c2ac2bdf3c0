"""Bits of a file that `turboquant tune` wrote, given to the layers of this process."""

from functools import cache
from typing import Any

from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from turboquant_core.layer_bits import LayerBits, read_layer_bits
from turboquant_vllm.backend import backend_with_bits
from turboquant_vllm.identity import model_identity

INSTEAD = 'Leave "layer_bits" out, or give a "preset".'


def read_for_model(path: str, model_config: Any) -> LayerBits:
    """The bits in a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, something else, belongs to another model than vLLM's `model_config` describes, or
            has fractional bits.
    """
    bits = _read(path, model_identity(model_config))
    for layer_index, pair in bits.layer_bits.items():
        if any(number != int(number) for number in pair):
            raise ValueError(
                f"{path} has {pair[0]} and {pair[1]} bits for layer {layer_index}, and the kernels read whole bits. "
                + INSTEAD
            )
    return bits


_read = cache(read_layer_bits)


def give_bits(impl: Any, bits: LayerBits, layers: dict[str, Any]) -> tuple[float, float]:
    """Have the layer of an implementation ask for pages of its own size, and say which bits they hold.

    vLLM asks the backend for the size of a page without saying of which layer, but it asks the layer for its backend.

    Args:
        impl: The implementation.
        bits: Of all layers.
        layers: All layers of this process by name, that of `impl` among them.

    Raises:
        ValueError: If the file has no bits for the layer, or pages of unlike sizes would not lie together.
    """
    name, layer = next((name, layer) for name, layer in layers.items() if getattr(layer, "impl", None) is impl)
    kinds = {_kind(layer) for layer in layers.values() if isinstance(layer, AttentionLayerBase)}
    if len(kinds) > 1 and len(set(bits.layer_bits.values())) > 1:
        raise ValueError(
            f"the bits of {bits.source} differ between layers, and this model has {' and '.join(sorted(kinds))}, whose "
            f"pages vLLM makes equally large. {INSTEAD}"
        )
    pair = bits.of_layer(extract_layer_index(name))
    layer.attn_backend = backend_with_bits(*pair)
    return pair


def _kind(layer: Any) -> str:
    if not hasattr(layer, "sliding_window"):
        return f"{type(layer).__name__} layers"
    return "layers without a window" if layer.sliding_window is None else f"windows of {layer.sliding_window}"
