"""A vector as two halves, the first coded finer: what a split of `VectorFormat` stores."""

from dataclasses import dataclass

import torch

from turboquant_core.mse import MSEQuantizer
from turboquant_core.packing import pack, unpack
from turboquant_core.quantized import QuantizedTensor, check_stored
from turboquant_core.rotation import Rotation
from turboquant_core.scale import ScaleRule, carried_together, check_scale_rule
from turboquant_core.vector_format import VectorFormat


@dataclass(frozen=True)
class HalvesRotation:
    """The rotation of either half of a vector by itself.

    Args:
        head_dim: Dimension of the vector, a multiple of 16.
    """

    head_dim: int

    @property
    def half(self) -> Rotation:
        """What rotates a half."""
        return Rotation(self.head_dim // 2)

    @property
    def matrix(self) -> torch.Tensor:
        """The rotation as float64 [head_dim, head_dim] on the CPU."""
        return torch.kron(torch.eye(2, dtype=torch.float64, device="cpu"), self.half.matrix)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """See `Rotation`."""
        return self.half.rotate(self._halves(x)).flatten(-2)

    def unrotate(self, y: torch.Tensor) -> torch.Tensor:
        """See `Rotation`."""
        return self.half.unrotate(self._halves(y)).flatten(-2)

    def _halves(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(*x.shape[:-1], 2, self.head_dim // 2)


@dataclass(frozen=True)
class SplitQuantizer:
    """The first half of the channels at one bit more than `bits` and the second at one less, each by `MSEQuantizer`.

    Halves have a rotation and a scale of their own: with one scale for both, unequal bits lose. Channel j of either
    half share a code of 2 * bits bits: that of the second half lies above that of the first.

    Args:
        head_dim: Dimension of the vectors, a multiple of 16 from 48 on.
        bits: 2, 3 or 4.
        scale: What the stored scales are, as in `MSEQuantizer`.
    """

    head_dim: int
    bits: int
    scale: ScaleRule = "norm"

    def __post_init__(self) -> None:
        check_scale_rule(self.scale)
        VectorFormat(self.head_dim, self.bits, split=True)

    @property
    def format(self) -> VectorFormat:
        """The bytes of one vector."""
        return VectorFormat(self.head_dim, self.bits, split=True)

    @property
    def rotation(self) -> HalvesRotation:
        """The rotation of halves."""
        return HalvesRotation(self.head_dim)

    def quantize(self, x: torch.Tensor) -> QuantizedTensor:
        """Quantise floating-point vectors x [..., head_dim].

        Raises:
            ValueError: If the last dimension is not `head_dim`, or x is not floating point.
        """
        if x.ndim == 0 or x.shape[-1] != self.head_dim:
            raise ValueError(
                f"got {x.dtype} {list(x.shape)}; this quantiser takes floating-point [..., {self.head_dim}]"
            )
        halves = [q.codes_of(half) for q, half in zip(self._quantizers, x.chunk(2, dim=-1), strict=True)]
        (first, first_scale), (second, second_scale) = halves
        codes = pack(first | (second << (self.bits + 1)), 2 * self.bits, check=False)
        scales = torch.cat([first_scale, second_scale], dim=-1)
        return QuantizedTensor(codes, carried_together(scales))

    def dequantize(self, q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The vectors [..., head_dim] in the given type.

        Raises:
            ValueError: If codes or scales are not those of this quantiser.
        """
        return self.rotation.unrotate(self.dequantize_rotated(q)).to(dtype)

    def dequantize_rotated(self, q: QuantizedTensor) -> torch.Tensor:
        """The same before `rotation` is undone, float32."""
        vectors = f"split {self.bits}-bit vectors of head_dim {self.head_dim}"
        check_stored(q, self.format.code_bytes, self.format.num_scales, vectors)
        codes = unpack(q.codes, 2 * self.bits, self.head_dim // 2)
        first, second = self._quantizers
        width = self.bits + 1
        halves = [
            first.of_codes(codes & (1 << width) - 1, q.scales[..., :1]),
            second.of_codes(codes >> width, q.scales[..., 1:]),
        ]
        return torch.cat(halves, dim=-1)

    @property
    def _quantizers(self) -> list[MSEQuantizer]:
        return [MSEQuantizer(group.num_channels, group.bits, self.scale) for group in self.format.groups]


WholeQuantizer = MSEQuantizer | SplitQuantizer
"""What quantises vectors of whole bits: no channels are told apart by the data."""


def quantizer_of(stored: VectorFormat, scale: ScaleRule = "norm") -> WholeQuantizer:
    """The quantiser of a format with whole bits."""
    kind = SplitQuantizer if stored.split else MSEQuantizer
    return kind(stored.head_dim, int(stored.bits), scale)
