"""The files of `turboquant calibrate` and `turboquant tune`, and which model they have to belong to.

A file is read once in a process: all layers of an engine have to agree on what is in it.
"""

from collections.abc import Callable, Hashable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from turboquant_core.calibration import Calibration, read_calibration
from turboquant_core.layer_bits import LayerBits, read_layer_bits
from turboquant_core.model_identity import ModelIdentity

T = TypeVar("T")


def calibration_of(model_config: Any, path: str) -> Calibration:
    """The calibration in a file, for the model that vLLM's `model_config` describes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, something else, belongs to another model, or was written again since it was read.
    """
    return _calibration(path, _identity(model_config))


def orders_every_layer(path: str, *, codes_only: bool) -> bool:
    """Whether a calibration orders the channels of all its layers by what an error in them costs.

    `codes_only` says whether first tokens are read as codes too.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or something else, or was written again since it was read.
    """
    return _calibration(path).orders_every_layer(codes_only=codes_only)


def layer_bits_of(model_config: Any, path: str) -> LayerBits:
    """The bits of every layer in a file, for the model that vLLM's `model_config` describes.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, something else, belongs to another model, has fractional bits, or was written
            again since it was read.
    """
    bits = _layer_bits(path, _identity(model_config))
    for layer_index, pair in bits.layer_bits.items():
        if any(number != int(number) for number in pair):
            raise ValueError(
                f"{path} has {pair[0]} and {pair[1]} bits for layer {layer_index}, and the kernels read whole bits. "
                'Leave "layer_bits" out, or give a "preset".'
            )
    return bits


def _once(read: Callable[..., T]) -> Callable[..., T]:
    """What `read` gives of a file, the first time in this process; every layer asks.

    Pages that are stored hang on what was in it. One that was written again since may be meant for another engine, and
    neither the old content nor the new one is right for both.
    """
    known: dict[Hashable, tuple[tuple[int, ...], T]] = {}

    @wraps(read)
    def read_once(path: str, *model: ModelIdentity) -> T:
        asked = (path, *model)
        try:
            status = Path(path).stat()
        except (OSError, ValueError):
            # Whoever reads it says best what is wrong with a path that is none.
            return read(path, *model)
        written = (status.st_ino, status.st_size, status.st_mtime_ns)
        if asked not in known:
            known[asked] = written, read(path, *model)
        first, content = known[asked]
        if written != first:
            raise ValueError(
                f"{path} was written again since this process read it, and pages may hang on what was in it. Start a "
                "new process, or give the new file another name."
            )
        return content

    return read_once


_calibration = _once(read_calibration)
_layer_bits = _once(read_layer_bits)


def _identity(model_config: Any) -> ModelIdentity:
    """Which model it is; of one that has images its text model."""
    architecture = (model_config.architectures or ["unknown"])[0]
    return ModelIdentity.of(model_config.hf_text_config, architecture)
