"""TurboQuant for least mean square error (paper, Algorithm 1)."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from turboquant_core._checks import check_bits, check_head_dim
from turboquant_core.codebook import ascending_codes, grid_codebook
from turboquant_core.kept import kept
from turboquant_core.packing import pack, unpack
from turboquant_core.quantized import QuantizedTensor
from turboquant_core.rotation import Rotation
from turboquant_core.scale import (
    ScaleRule,
    check_scale_rule,
    corrected_scale,
    decode_scale,
    encode_scale,
)


@dataclass(frozen=True)
class MSEQuantizer:
    """Rotate, take the nearest centroid of every coordinate, pack, keep one scale (paper, Algorithm 1).

    With s = ‖x‖ and y = Πx / s, code_j is that of the centroid nearest to y_j, and x̂ = t Πᵀ c[code], where the
    stored scale t follows `scale` (see `turboquant_core.scale.corrected_scale`).

    A zero vector comes back as zero. A vector with NaN or inf in it, or longer than 4.29e9, comes back with no finite
    coordinate: it is carried, never turned into a plausible vector. Lengths under 4e-9 lose precision, and under 9e-16
    they become zero.

    Args:
        head_dim: Dimension of the vectors, a multiple of 8 from 8 to 512.
        bits: Bits per coordinate, 1 to 8.
        scale: What the stored scale is: "norm", "unbiased" or "least_squares".
        seed: The rotation's; None is the format's own.
    """

    head_dim: int
    bits: int
    scale: ScaleRule = "norm"
    seed: int | None = None

    def __post_init__(self) -> None:
        check_head_dim(self.head_dim)
        check_bits(self.bits)
        check_scale_rule(self.scale)

    @property
    def rotation(self) -> Rotation:
        """The rotation Π."""
        return Rotation(self.head_dim, self.seed)

    def quantize(self, x: torch.Tensor) -> QuantizedTensor:
        """Quantise floating-point vectors x [..., head_dim]; arithmetic is float32 (float64 for float64 input).

        Raises:
            ValueError: If the last dimension is not `head_dim`, or x is not floating point.
        """
        codes, scales = self.codes_of(x)
        return QuantizedTensor(pack(codes, self.bits, check=False), scales)

    def codes_of(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `quantize` packs: codes uint8 [..., head_dim] and stored scales float16 [..., 1]."""
        norm, unit = split_norm(x, self.head_dim)
        unit = self.rotation.rotate(unit)
        tables = codebook_tables(self.head_dim, self.bits, unit.device, unit.dtype)
        nearest = torch.bucketize(unit, tables.boundaries, out_int32=True)
        scale = corrected_scale(norm, unit, _look_up(tables.centroids, nearest), self.scale)
        return _look_up(tables.codes, nearest), encode_scale(scale)

    def dequantize(self, q: QuantizedTensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The vectors x̂ [..., head_dim] in the given type.

        Raises:
            ValueError: If codes or scales are not those of this quantiser.
        """
        return self.rotation.unrotate(self.dequantize_rotated(q)).to(dtype)

    def dequantize_rotated(self, q: QuantizedTensor) -> torch.Tensor:
        """Πx̂, float32 [..., head_dim]: what attention on codes multiplies with a rotated query."""
        if q.scales.shape != (*q.shape, 1):
            raise ValueError(f"scales are {list(q.scales.shape)}; codes {list(q.codes.shape)} have {[*q.shape, 1]}")
        return self.of_codes(unpack(q.codes, self.bits, self.head_dim), q.scales)

    def of_codes(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """`dequantize_rotated` of codes that are not packed, uint8 [..., head_dim], and scales [..., 1]."""
        centroids = codebook_tables(self.head_dim, self.bits, codes.device, torch.float32).by_code
        return _look_up(centroids, codes.int()).mul_(decode_scale(scales))


def split_norm(x: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths [..., 1] and unit vectors [..., head_dim] of x, in float32 or wider; a zero vector stays zero.

    Raises:
        ValueError: If the last dimension is not `head_dim`, or x is not floating point.
    """
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] != head_dim:
        raise ValueError(f"got {x.dtype} {list(x.shape)}; this quantiser takes floating-point [..., {head_dim}]")
    x = x if x.dtype == torch.float64 else x.float()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm, torch.where(norm == 0, x, x / norm)


class CodebookTables(NamedTuple):
    """A codebook on a device.

    Attributes:
        centroids: [2**bits], ascending.
        boundaries: [2**bits - 1], between them.
        codes: uint8 [2**bits], those of `centroids`.
        by_code: [2**bits], what each code means.
    """

    centroids: torch.Tensor
    boundaries: torch.Tensor
    codes: torch.Tensor
    by_code: torch.Tensor


@kept
def codebook_tables(head_dim: int, bits: int, device: torch.device, dtype: torch.dtype) -> CodebookTables:
    """The tables of a codebook, kept on the device; centroids and boundaries in a floating-point type."""
    codebook = grid_codebook(head_dim, bits)
    return CodebookTables(
        codebook.centroids.to(device, dtype),
        codebook.boundaries.to(device, dtype),
        ascending_codes(bits).to(device, torch.uint8),
        codebook.centroids_by_code.to(device, dtype),
    )


def _look_up(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    # Four times as fast as table[index] on a CPU, where reading a cache consists of this.
    return table.index_select(0, index.flatten()).view(index.shape)
