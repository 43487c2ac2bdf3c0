"""How the vectors of one layer become codes, with what is taken from its first tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from turboquant_core import MSEQuantizer, OutlierQuantizer, QuantizedTensor, TurboQuantConfig
from turboquant_core.scale import ScaleRule
from turboquant_core.vector_format import OUTLIER_BITS

Quantizer = MSEQuantizer | OutlierQuantizer


@dataclass(frozen=True, eq=False)
class LayerCodec:
    """The quantisers of a layer's keys and values, and the mean that is subtracted from keys.

    What depends on data, the mean and the outlier channels, is one for every row and head.

    Attributes:
        key_mean: float32 [heads, head_dim], or None where keys are not centred.
        keys: Quantises centred keys.
        values: Quantises values.
    """

    key_mean: torch.Tensor | None
    keys: Quantizer
    values: Quantizer

    @classmethod
    def calibrate(cls, config: TurboQuantConfig, keys: torch.Tensor, values: torch.Tensor) -> "LayerCodec":
        """The codec of a layer whose first keys and values are these, [num_tokens, heads, head_dim]."""
        mean = keys.float().mean(0) if config.center_keys else None
        return cls(
            mean,
            _quantizer(_centred(keys, mean), config.key_bits, config.key_scale),
            _quantizer(values, config.value_bits, config.value_scale),
        )

    def quantize(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Keys and values [num_tokens, heads, head_dim] as codes."""
        return self.keys.quantize(_centred(keys, self.key_mean)), self.values.quantize(values)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LayerCodec":
        """The codec with `function`, a choice of heads or a move, applied to every tensor [heads, head_dim]."""
        mean = None if self.key_mean is None else function(self.key_mean)
        return LayerCodec(mean, map_order(self.keys, function), map_order(self.values, function))

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor kept."""
        orders = [q.channel_order for q in (self.keys, self.values) if isinstance(q, OutlierQuantizer)]
        return orders if self.key_mean is None else [self.key_mean, *orders]


def map_order(quantizer: Quantizer, function: Callable[[torch.Tensor], torch.Tensor]) -> Quantizer:
    """The quantiser with `function` applied to its channel order, if it has one."""
    return quantizer.map(function) if isinstance(quantizer, OutlierQuantizer) else quantizer


def _centred(keys: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    return keys if mean is None else keys.float() - mean


def _quantizer(states: torch.Tensor, bits: float, scale: ScaleRule) -> Quantizer:
    """The quantiser for vectors like these [num_tokens, heads, head_dim]."""
    if bits in OUTLIER_BITS:
        return OutlierQuantizer.calibrate(states, bits, dim=0, scale=scale).map(lambda order: order[0])
    return MSEQuantizer(states.shape[-1], int(bits), scale)
