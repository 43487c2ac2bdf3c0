"""The files of `turboquant calibrate` and `turboquant tune`, and which model they have to belong to."""

from functools import cache
from typing import Any

from turboquant_core.calibration import Calibration, read_calibration
from turboquant_core.layer_bits import LayerBits, read_layer_bits
from turboquant_core.model_identity import ModelIdentity


def calibration_of(model_config: Any, path: str) -> Calibration:
    """The calibration in a file, for the model that vLLM's `model_config` describes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, something else, or belongs to another model.
    """
    return _calibration(path, _identity(model_config))


def orders_every_layer(path: str, *, codes_only: bool) -> bool:
    """Whether a calibration orders the channels of all its layers by what an error in them costs.

    `codes_only` says whether first tokens are read as codes too.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or something else.
    """
    return _calibration(path).orders_every_layer(codes_only=codes_only)


def layer_bits_of(model_config: Any, path: str) -> LayerBits:
    """The bits of every layer in a file, for the model that vLLM's `model_config` describes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, something else, belongs to another model, or has fractional bits.
    """
    bits = _layer_bits(path, _identity(model_config))
    for layer_index, pair in bits.layer_bits.items():
        if any(number != int(number) for number in pair):
            raise ValueError(
                f"{path} has {pair[0]} and {pair[1]} bits for layer {layer_index}, and the kernels read whole bits. "
                'Leave "layer_bits" out, or give a "preset".'
            )
    return bits


# Every layer asks.
_calibration = cache(read_calibration)
_layer_bits = cache(read_layer_bits)


def _identity(model_config: Any) -> ModelIdentity:
    """Which model it is; of one that has images its text model."""
    architecture = (model_config.architectures or ["unknown"])[0]
    return ModelIdentity.of(model_config.hf_text_config, architecture)
