"""Fractional bits: a few channels of every vector coded finer than the rest (paper, Section 4.3)."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass

import torch

from turboquant_core.mse import MSEQuantizer
from turboquant_core.quantized import QuantizedTensor, check_stored
from turboquant_core.scale import ScaleRule, carried_together, check_scale_rule
from turboquant_core.vector_format import OUTLIER_BITS, VectorFormat


@dataclass(frozen=True, eq=False)
class OutlierQuantizer:
    """2.5 or 3.5 bits: the quarter of channels with most energy at two bits more, each set with a rotation of its own.

    `QuantizedTensor.codes` holds the outliers' codes and then the others'; `scales` holds one scale for each set.

    Args:
        bits: 2.5 (a quarter at 4 bits, the rest at 2) or 3.5 (5 and 3).
        channel_order: int64 [..., head_dim]: for each group of vectors (for example a KV head) its channels, outliers
            first. Leading dimensions broadcast against those of the quantised vectors.
        scale: What the stored scales are, as in `MSEQuantizer`.
    """

    bits: float
    channel_order: torch.Tensor
    scale: ScaleRule = "norm"

    def __post_init__(self) -> None:
        if self.bits not in OUTLIER_BITS:
            known = ", ".join(str(bits) for bits in OUTLIER_BITS)
            raise ValueError(f"bits is {self.bits}; outlier channels serve {known}")
        check_scale_rule(self.scale)
        VectorFormat(self.head_dim, self.bits)
        channels = torch.arange(self.head_dim, device=self.channel_order.device)
        if not torch.equal(self.channel_order.sort(-1).values, channels.expand_as(self.channel_order)):
            raise ValueError(f"channel_order must name each of the {self.head_dim} channels once")

    @classmethod
    def calibrate(cls, x: torch.Tensor, bits: float, *, dim: int = -2, scale: ScaleRule = "norm") -> "OutlierQuantizer":
        """Choose the outlier channels from the energy of sample vectors x [..., head_dim], summed over `dim`.

        Raises:
            ValueError: If x is a single vector.
        """
        if x.ndim < 2:
            raise ValueError(f"got {list(x.shape)}; calibration takes sample vectors [..., num_samples, head_dim]")
        energy = x.float().square().sum(dim, keepdim=True)
        return cls(bits, energy.argsort(dim=-1, descending=True, stable=True), scale)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "OutlierQuantizer":
        """Apply an operation on leading dimensions of the channel order, or a move to another device.

        The order stays valid and is not looked at again: that would wait for the device, or read an unfinished copy.
        """
        mapped = copy(self)
        object.__setattr__(mapped, "channel_order", function(self.channel_order))
        return mapped

    @property
    def head_dim(self) -> int:
        """Dimension of the vectors."""
        return self.channel_order.shape[-1]

    @property
    def format(self) -> VectorFormat:
        """The bytes of one vector."""
        return VectorFormat(self.head_dim, self.bits)

    def quantize(self, x: torch.Tensor) -> QuantizedTensor:
        """Quantise floating-point vectors x [..., head_dim].

        Raises:
            ValueError: If the shape does not fit `channel_order`, or x is not floating point.
        """
        ordered = x.gather(-1, self._order_for(x.shape))
        sizes = [group.num_channels for group in self.format.groups]
        parts = [
            quantizer.quantize(part)
            for quantizer, part in zip(self._quantizers, ordered.split_with_sizes(sizes, dim=-1), strict=True)
        ]
        q = QuantizedTensor.cat(parts, dim=-1)
        return QuantizedTensor(q.codes, carried_together(q.scales))

    def dequantize(self, q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The vectors x̂ [..., head_dim] in the given type.

        Raises:
            ValueError: If the code bytes or scales are not those of this format.
        """
        vectors = f"{self.bits}-bit vectors of head_dim {self.head_dim}"
        check_stored(q, self.format.code_bytes, self.format.num_scales, vectors)
        codes = q.codes.split_with_sizes([group.code_bytes for group in self.format.groups], dim=-1)
        scales = q.scales.split_with_sizes([1] * self.format.num_scales, dim=-1)
        ordered = torch.cat(
            [
                quantizer.dequantize(QuantizedTensor(*part), dtype)
                for quantizer, *part in zip(self._quantizers, codes, scales, strict=True)
            ],
            dim=-1,
        )
        return torch.empty_like(ordered).scatter(-1, self._order_for(ordered.shape), ordered)

    def _order_for(self, shape: torch.Size) -> torch.Tensor:
        try:
            return self.channel_order.expand(shape)
        except RuntimeError as error:
            raise ValueError(
                f"got {list(shape)}; this quantiser takes floating-point [..., {self.head_dim}] that its channel order "
                f"{list(self.channel_order.shape)} expands to"
            ) from error

    @property
    def _quantizers(self) -> list[MSEQuantizer]:
        return [MSEQuantizer(group.num_channels, group.bits, self.scale) for group in self.format.groups]
