"""Bits of every layer, from a file that `turboquant tune` wrote."""

from functools import cache
from typing import Any

from turboquant_core.layer_bits import LayerBits, read_layer_bits
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
