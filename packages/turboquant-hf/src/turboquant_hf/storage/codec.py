"""How the vectors of one layer become codes, with what is taken from its first tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from turboquant_core import MSEQuantizer, OutlierQuantizer, QuantizedTensor, TurboQuantConfig
from turboquant_core.centring import mean_key
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.scale import ScaleRule, is_storable
from turboquant_core.vector_format import OUTLIER_BITS

Quantizer = MSEQuantizer | OutlierQuantizer
_ORDERS = ("key_order", "value_order")


@dataclass(frozen=True, eq=False)
class LayerCodec:
    """What turns keys and values of a layer into codes.

    What depends on data, the transform of keys and the outlier channels, is one for every row and head.

    Attributes:
        config: What is stored for one head.
        key_transform: What keys go through first, of tensors [heads, ...].
        key_order: int64 [heads, head_dim], the channels of keys, outliers first; None for whole bits.
        value_order: The same for values.
    """

    config: TurboQuantConfig
    # No default: Dynamo of torch 2.11 knows no place that it would come from.
    key_transform: KeyTransform
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
        transform = KeyTransform(mean_key(keys, counts)) if config.center_keys else IDENTITY
        return cls(
            config,
            transform,
            _channel_order(keys, config.key_bits, counts, transform),
            _channel_order(values, config.value_bits, counts),
        )

    @classmethod
    def of_named(cls, config: TurboQuantConfig, tensors: Mapping[str, torch.Tensor]) -> "LayerCodec":
        """The codec that `named` named tensors of; other names are passed over.

        Raises:
            ValueError: If an order does not name every channel once.
        """
        codec = cls(config, KeyTransform.from_tensors(tensors), *(tensors.get(name) for name in _ORDERS))
        for bits, order in ((config.key_bits, codec.key_order), (config.value_bits, codec.value_order)):
            if order is not None:
                OutlierQuantizer(bits, order)
        return codec

    def named(self) -> dict[str, torch.Tensor]:
        """What a file keeps of it, by name."""
        orders = {name: getattr(self, name) for name in _ORDERS}
        return self.key_transform.tensors() | {name: order for name, order in orders.items() if order is not None}

    @cached_property
    def has_whole_bits(self) -> bool:
        """Whether core's kernels can store and read the codes."""
        return has_whole_bits(self.config)

    def quantize(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Keys and values [num_tokens, heads, head_dim] as codes."""
        return self._keys().quantize(self.key_transform.of_keys(keys)), self._values().quantize(values)

    def dequantize_keys(self, stored: QuantizedTensor) -> torch.Tensor:
        """Keys float32 [heads, num_tokens, head_dim]."""
        keys = _heads_first(self._keys()).dequantize(stored)
        return self.key_transform.restored(keys.transpose(0, 1)).transpose(0, 1)

    def dequantize_values(self, stored: QuantizedTensor) -> torch.Tensor:
        """Values float32 [heads, num_tokens, head_dim]."""
        return _heads_first(self._values()).dequantize(stored)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "LayerCodec":
        """The codec with `function`, a choice of heads or a move, applied to every tensor."""

        def mapped(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else function(tensor)

        return LayerCodec(
            self.config, self.key_transform.map(function), mapped(self.key_order), mapped(self.value_order)
        )

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor kept."""
        tensors = (*self.key_transform.parts, self.key_order, self.value_order)
        return [tensor for tensor in tensors if tensor is not None]

    def _keys(self) -> Quantizer:
        return _quantizer(self.config.head_dim, self.config.key_bits, self.config.key_scale, self.key_order)

    def _values(self) -> Quantizer:
        return _quantizer(self.config.head_dim, self.config.value_bits, self.config.value_scale, self.value_order)


def has_whole_bits(config: TurboQuantConfig) -> bool:
    """Whether core's kernels can store and read codes of that configuration."""
    return config.key_bits not in OUTLIER_BITS and config.value_bits not in OUTLIER_BITS


def _heads_first(quantizer: Quantizer) -> Quantizer:
    """The quantiser for vectors [heads, num_tokens, head_dim]."""
    return quantizer.map(lambda order: order[:, None]) if isinstance(quantizer, OutlierQuantizer) else quantizer


def _channel_order(
    states: torch.Tensor, bits: float, counts: torch.Tensor | None, transform: KeyTransform = IDENTITY
) -> torch.Tensor | None:
    if bits not in OUTLIER_BITS:
        return None
    counted = is_storable(states) if counts is None else counts & is_storable(states)
    states = torch.where(counted[..., None], transform.of_keys(states), 0.0)
    return OutlierQuantizer.calibrate(states, bits, dim=0).channel_order[0]


def _quantizer(head_dim: int, bits: float, scale: ScaleRule, order: torch.Tensor | None) -> Quantizer:
    return MSEQuantizer(head_dim, int(bits), scale) if order is None else OutlierQuantizer(bits, order, scale)
