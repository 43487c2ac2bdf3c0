"""How the vectors of one layer become codes, with what is taken from its first tokens."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from turboquant_core import MSEQuantizer, OutlierQuantizer, QuantizedTensor, TurboQuantConfig
from turboquant_core.centring import mean_key
from turboquant_core.scale import ScaleRule, is_storable
from turboquant_core.vector_format import OUTLIER_BITS

Quantizer = MSEQuantizer | OutlierQuantizer


@dataclass(frozen=True, eq=False)
class LayerCodec:
    """What turns keys and values of a layer into codes.

    What depends on data, the mean and the outlier channels, is one for every row and head.

    Attributes:
        config: What is stored for one head.
        key_mean: float32 [heads, head_dim], subtracted from keys; None where keys are not centred.
        key_order: int64 [heads, head_dim], the channels of keys, outliers first; None for whole bits.
        value_order: The same for values.
    """

    config: TurboQuantConfig
    key_mean: torch.Tensor | None = None
    key_order: torch.Tensor | None = None
    value_order: torch.Tensor | None = None

    @classmethod
    def calibrate(
        cls, config: TurboQuantConfig, keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor | None = None
    ) -> "LayerCodec":
        """The codec of a layer whose first keys and values are these.

        Args:
            config: What is stored for one head.
            keys: [num_tokens, heads, head_dim].
            values: The same for values.
            counts: bool [num_tokens, heads], which of them to take it from, some of each head; None for all. Vectors
                that do not come back finite never count.
        """
        mean = mean_key(keys, counts) if config.center_keys else None
        return cls(
            config,
            mean,
            _channel_order(keys, config.key_bits, counts, mean),
            _channel_order(values, config.value_bits, counts),
        )

    @property
    def has_whole_bits(self) -> bool:
        """Whether core's kernels can store and read the codes."""
        return self.config.key_bits not in OUTLIER_BITS and self.config.value_bits not in OUTLIER_BITS

    def quantize(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Keys and values [num_tokens, heads, head_dim] as codes."""
        return self._keys().quantize(_centred(keys, self.key_mean)), self._values().quantize(values)

    def dequantize_keys(self, stored: QuantizedTensor) -> torch.Tensor:
        """Keys float32 [heads, num_tokens, head_dim]."""
        keys = _heads_first(self._keys()).dequantize(stored)
        return keys if self.key_mean is None else keys.add_(self.key_mean[:, None])

    def dequantize_values(self, stored: QuantizedTensor) -> torch.Tensor:
        """Values float32 [heads, num_tokens, head_dim]."""
        return _heads_first(self._values()).dequantize(stored)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LayerCodec":
        """The codec with `function`, a choice of heads or a move, applied to every tensor."""

        def mapped(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else function(tensor)

        return LayerCodec(self.config, mapped(self.key_mean), mapped(self.key_order), mapped(self.value_order))

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor kept."""
        return [tensor for tensor in (self.key_mean, self.key_order, self.value_order) if tensor is not None]

    def _keys(self) -> Quantizer:
        return _quantizer(self.config.head_dim, self.config.key_bits, self.config.key_scale, self.key_order)

    def _values(self) -> Quantizer:
        return _quantizer(self.config.head_dim, self.config.value_bits, self.config.value_scale, self.value_order)


def _heads_first(quantizer: Quantizer) -> Quantizer:
    """The quantiser for vectors [heads, num_tokens, head_dim]."""
    return quantizer.map(lambda order: order[:, None]) if isinstance(quantizer, OutlierQuantizer) else quantizer


def _centred(keys: torch.Tensor, mean: torch.Tensor | None) -> torch.Tensor:
    return keys if mean is None else keys.float() - mean


def _channel_order(
    states: torch.Tensor, bits: float, counts: torch.Tensor | None, mean: torch.Tensor | None = None
) -> torch.Tensor | None:
    if bits not in OUTLIER_BITS:
        return None
    counted = is_storable(states) if counts is None else counts & is_storable(states)
    states = torch.where(counted[..., None], _centred(states, mean), 0.0)
    return OutlierQuantizer.calibrate(states, bits, dim=0).channel_order[0]


def _quantizer(head_dim: int, bits: float, scale: ScaleRule, order: torch.Tensor | None) -> Quantizer:
    return MSEQuantizer(head_dim, int(bits), scale) if order is None else OutlierQuantizer(bits, order, scale)
