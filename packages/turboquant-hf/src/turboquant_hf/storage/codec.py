"""How the vectors of one layer become codes, with what is taken from its first tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from turboquant_core import OutlierQuantizer, QuantizedTensor, TurboQuantConfig
from turboquant_core.centring import mean_key
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.layout import PageViews
from turboquant_core.scale import ScaleRule, is_storable
from turboquant_core.split import WholeQuantizer, quantizer_of
from turboquant_core.vector_format import OUTLIER_BITS, VectorFormat

# Coordinates dequantised at a time, in float32: what bounds the working set beside the result.
DEQUANTIZED_AT_ONCE = 1 << 22
Quantizer = WholeQuantizer | OutlierQuantizer
_ORDERS = ("key_order", "value_order")


@dataclass(frozen=True, eq=False)
class LayerCodec:
    """What turns keys and values of a layer into codes.

    What depends on data, the transform of keys and the outlier channels, is one for every row and head.

    Attributes:
        config: What is stored for one head.
        key_transform: What keys go through first, of tensors [heads, ...].
        key_order: int64 [heads, head_dim], the channels of keys, outliers first; None for whole bits.
        value_order: The same for values, [heads, value_head_dim].
    """

    config: TurboQuantConfig
    # No default: Dynamo of torch 2.11 knows no place that it would come from.
    key_transform: KeyTransform
    key_order: torch.Tensor | None = None
    value_order: torch.Tensor | None = None

    @classmethod
    def calibrate(
        cls,
        config: TurboQuantConfig,
        keys: torch.Tensor,
        values: torch.Tensor,
        counts: torch.Tensor | None = None,
        key_transform: KeyTransform = IDENTITY,
    ) -> "LayerCodec":
        """The codec of a layer whose first keys and values are these.

        Args:
            config: What is stored for one head.
            keys: [num_tokens, heads, head_dim].
            values: The same for values, [num_tokens, heads, value_head_dim].
            counts: bool [num_tokens, heads], which of them to take it from, some of each head; None for all. Vectors
                that do not come back finite never count.
            key_transform: What keys go through first, of tensors [heads, ...]; without a mean they are stored less that
                of these keys, if `config` says so.
        """
        if key_transform.mean is None and config.center_keys:
            key_transform = KeyTransform.of_parts(mean_key(keys, counts), key_transform.scale, key_transform.order)
        return cls(
            config,
            key_transform,
            _channel_order(keys, config.key_bits, counts, key_transform),
            _channel_order(values, config.value_bits, counts),
        )

    @classmethod
    def of_named(cls, config: TurboQuantConfig, tensors: Mapping[str, torch.Tensor]) -> "LayerCodec":
        """The codec that `named` named tensors of; other names are passed over.

        Raises:
            ValueError: If a transform of keys has wrong values, or an order does not name every channel once.
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

    def write(self, views: PageViews, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store keys and values [num_tokens, heads, ...] as codes at slots int64 [num_tokens] of pages."""
        stored_keys, stored_values = self.quantize(keys, values)
        _put(views.key_codes, slots, stored_keys.codes)
        _put(views.key_scales, slots, stored_keys.scales)
        _put(views.value_codes, slots, stored_values.codes)
        _put(views.value_scales, slots, stored_values.scales)

    def read(self, views: PageViews, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `count` pages, [heads, count * block_size, ...]."""
        _, num_heads, block_size, _ = views.key_codes.shape
        keys, values = (
            torch.empty(num_heads, count * block_size, head_dim, dtype=dtype, device=views.key_codes.device)
            for head_dim in self.config.head_dims
        )
        step = max(1, DEQUANTIZED_AT_ONCE // (num_heads * block_size * max(self.config.head_dims)))
        for first in range(0, count, step):
            blocks = slice(first, min(first + step, count))
            tokens = slice(first * block_size, blocks.stop * block_size)
            keys[:, tokens] = self.dequantize_keys(_taken(views.key_codes, views.key_scales, blocks))
            values[:, tokens] = self.dequantize_values(_taken(views.value_codes, views.value_scales, blocks))
        return keys, values

    def quantize(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[QuantizedTensor, QuantizedTensor]:
        """Keys and values [num_tokens, heads, ...] as codes."""
        return self._keys().quantize(self.key_transform.of_keys(keys)), self._values().quantize(values)

    def dequantize_keys(self, stored: QuantizedTensor) -> torch.Tensor:
        """Keys float32 [heads, num_tokens, head_dim]."""
        keys = _heads_first(self._keys()).dequantize(stored)
        return self.key_transform.restored(keys.transpose(0, 1)).transpose(0, 1)

    def dequantize_values(self, stored: QuantizedTensor) -> torch.Tensor:
        """Values float32 [heads, num_tokens, value_head_dim]."""
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
        return _quantizer(self.config.key_format, self.config.key_scale, self.key_order)

    def _values(self) -> Quantizer:
        return _quantizer(self.config.value_format, self.config.value_scale, self.value_order)


def of_equal_rows(key_transform: KeyTransform, batch_size: int, device: torch.device) -> KeyTransform:
    """A transform of tensors [num_kv_heads, ...] for the heads of every row, [batch_size * num_kv_heads, ...]."""
    return key_transform.map(lambda part: part.detach().to(device).repeat(batch_size, *[1] * (part.ndim - 1)))


def _put(field: torch.Tensor, slots: torch.Tensor, new: torch.Tensor) -> None:
    """Write [num_tokens, heads, n] into a field [blocks, heads, slots, n]; nothing is written at slots that are none.

    Which they are is not looked at, for a graph could not: in their place the first token is written again, and if it
    has no slot either, what is there already.
    """
    block_size = field.shape[2]
    capacity = len(field) * block_size
    written = (slots >= 0) & (slots < capacity)
    slots = torch.where(written, slots, slots[:1]).clamp(min=0, max=capacity - 1)
    new = torch.where(written[:, None, None], new, new[:1])
    at = (slots // block_size, slice(None), slots % block_size)
    field[at] = torch.where(written[:1], new, field[at])


def _taken(codes: torch.Tensor, scales: torch.Tensor, blocks: slice) -> QuantizedTensor:
    """Fields [blocks, heads, slots, n] of some blocks, as [heads, tokens, n]."""
    return QuantizedTensor(*(x[blocks].transpose(0, 1).flatten(1, 2) for x in (codes, scales)))


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


def _quantizer(stored: VectorFormat, scale: ScaleRule, order: torch.Tensor | None) -> Quantizer:
    return quantizer_of(stored, scale) if order is None else OutlierQuantizer(stored.bits, order, scale)
