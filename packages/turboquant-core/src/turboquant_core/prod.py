"""TurboQuant with unbiased inner products (paper, Algorithm 2)."""

import math
from dataclasses import dataclass

import torch

from turboquant_core._checks import check_bits, check_head_dim
from turboquant_core._seeded import random_normal
from turboquant_core.kept import kept
from turboquant_core.mse import MSEQuantizer, split_norm
from turboquant_core.packing import pack, packed_bytes, unpack
from turboquant_core.quantized import QuantizedTensor, check_stored
from turboquant_core.scale import decode_scale, encode_scale


@dataclass(frozen=True)
class ProdQuantizer:
    """b - 1 bits by `MSEQuantizer`, and one bit per coordinate for a sketch of what it left over (paper, Algorithm 2).

    With x̃ the reconstruction at b - 1 bits and r = x - x̃, the sketch is sign(Sr) with S Gaussian [d, d], and
    x̂ = x̃ + sqrt(π/2)/d ‖r‖ Sᵀ sign(Sr), so that E⟨q, x̂⟩ = ⟨q, x⟩ over S. `QuantizedTensor.codes` holds the
    packed codes and then the packed signs; `scales` holds ‖x‖ and ‖r‖. At one bit there is no codebook and x̃ = 0.

    Attention is better served by `MSEQuantizer` at the same bits: its error is smaller, and softmax forgives a constant
    factor but not variance. This one is for inner products that must be right on average.

    Args:
        head_dim: Dimension of the vectors, a multiple of 8 from 8 to 512.
        bits: Bits per coordinate in all, 1 to 8.
        seed: The rotation's and the sketch's; None is the format's own.
    """

    head_dim: int
    bits: int
    seed: int | None = None

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)
        check_bits(self.bits)

    def quantize(self, x: torch.Tensor) -> QuantizedTensor:
        """Quantise floating-point vectors x [..., head_dim].

        Raises:
            ValueError: If the last dimension is not `head_dim`, or x is not floating point.
        """
        norm, unit = split_norm(x, self.head_dim)
        residual, code_parts, scale = unit, [], encode_scale(norm)
        if self._base is not None:
            base = self._base.quantize(unit)
            residual = unit - self._base.dequantize(base, unit.dtype)
            code_parts = [base.codes]
            scale = encode_scale(norm * decode_scale(base.scales, norm.dtype))
        sketch = residual @ _sketch(self.head_dim, self.seed, unit.device, unit.dtype).T
        signs = pack((sketch > 0).to(torch.uint8), 1, check=False)
        residual_norm = norm * torch.linalg.vector_norm(residual, dim=-1, keepdim=True)
        return QuantizedTensor(
            torch.cat([*code_parts, signs], dim=-1),
            torch.cat([scale, encode_scale(residual_norm)], dim=-1),
        )

    def dequantize(self, q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The vectors x̂ [..., head_dim] in the given type."""
        coarse, signs, residual_norm = self._split(q)
        sketch = _sketch(self.head_dim, self.seed, signs.device, torch.float32)
        return (coarse + self._gain * residual_norm * (signs @ sketch)).to(dtype)

    def inner_product(self, query: torch.Tensor, q: QuantizedTensor) -> torch.Tensor:
        """Unbiased estimates of ⟨query, x⟩, without rebuilding x.

        Args:
            query: Full-precision vectors [..., head_dim], broadcast against the stored ones.
            q: Stored vectors.

        Returns:
            float32, the broadcast leading dimensions.
        """
        query = query.float()
        coarse, signs, residual_norm = self._split(q)
        sketch = _sketch(self.head_dim, self.seed, signs.device, torch.float32)
        correction = ((query @ sketch.T) * signs).sum(-1)
        return (query * coarse).sum(-1) + self._gain * residual_norm.squeeze(-1) * correction

    @property
    def _base(self) -> MSEQuantizer | None:
        return MSEQuantizer(self.head_dim, self.bits - 1, seed=self.seed) if self.bits > 1 else None

    @property
    def _gain(self) -> float:
        return math.sqrt(math.pi / 2) / self.head_dim

    def _split(self, q: QuantizedTensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x̃ [..., d], the signs ±1 [..., d] and ‖r‖ [..., 1]."""
        expected = packed_bytes(self.head_dim, 1)
        if self._base is not None:
            expected += packed_bytes(self.head_dim, self.bits - 1)
        check_stored(q, expected, 2, f"{self.bits}-bit Prod vectors of head_dim {self.head_dim}")
        sign_bytes = packed_bytes(self.head_dim, 1)
        signs = 2.0 * unpack(q.codes[..., -sign_bytes:], 1, self.head_dim).float() - 1.0
        residual_norm = decode_scale(q.scales[..., 1:])
        if self._base is None:
            return torch.zeros_like(signs), signs, residual_norm
        base = QuantizedTensor(q.codes[..., :-sign_bytes], q.scales[..., :1])
        return self._base.dequantize(base), signs, residual_norm


@kept
def _sketch(head_dim: int, seed: int | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    normal = random_normal(f"sketch/{head_dim}/{seed or 0}", (head_dim, head_dim))
    return torch.from_numpy(normal).to(device, dtype)
