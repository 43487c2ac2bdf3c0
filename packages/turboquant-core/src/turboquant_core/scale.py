"""The two stored bytes that give a vector its length back.

A vector is kept as t * c[codes]. The length s = ‖x‖ is one choice of t; folding a correction into it costs no bytes
(after EDEN, arXiv 2604.18555). What is stored is sqrt(t) as float16, which carries lengths from 4e-9 to 4e9 with eleven
significant bits of their root: float16 itself overflows at 65,504, and bfloat16's eight bits would add 7 % to the error
of 8-bit codes.
"""

from typing import Literal, get_args

import torch

ScaleRule = Literal["norm", "unbiased", "least_squares"]
SCALE_RULES: tuple[ScaleRule, ...] = get_args(ScaleRule)
SCALE_DTYPE = torch.float16
SCALE_BYTES = SCALE_DTYPE.itemsize
MAX_SCALE = torch.finfo(SCALE_DTYPE).max ** 2


def check_scale_rule(rule: str) -> None:
    """Raise ValueError for a rule that does not exist."""
    if rule not in SCALE_RULES:
        raise ValueError(f"scale rule is {rule!r}; it must be one of {', '.join(SCALE_RULES)}")


def corrected_scale(norm: torch.Tensor, unit: torch.Tensor, decoded: torch.Tensor, rule: ScaleRule) -> torch.Tensor:
    """The scale t of x ≈ t * decoded.

    - `norm`: t = ‖x‖, the paper's.
    - `unbiased`: t = ‖x‖ / ⟨c, y⟩, so that E⟨q, x̂⟩ = ⟨q, x⟩; plain norms shrink inner products by the mean square
      error.
    - `least_squares`: t = ‖x‖ ⟨c, y⟩ / ⟨c, c⟩, the smallest ‖x - x̂‖.

    Args:
        norm: ‖x‖, [..., 1].
        unit: The rotated unit vector y, [..., head_dim].
        decoded: Its centroids c, [..., head_dim].
        rule: Which t.

    Returns:
        t as [..., 1]; zero where the norm is zero, and not finite where it is not.
    """
    if rule == "norm":
        return norm
    inner = (decoded * unit).sum(-1, keepdim=True)
    ratio = 1 / inner if rule == "unbiased" else inner / decoded.square().sum(-1, keepdim=True)
    corrected = norm * ratio
    return torch.where(norm == 0, norm, corrected)


def is_storable(x: torch.Tensor) -> torch.Tensor:
    """Which vectors x [..., head_dim] come back finite, bool [...]: those without NaN or inf, up to 4.29e9 long."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=wide)
    return norm <= MAX_SCALE


def carried_together(stored: torch.Tensor) -> torch.Tensor:
    """The scales [..., num_scales] of a vector's groups, all NaN where one is not finite.

    A vector with NaN or inf in one group is not to come back half plausible.
    """
    return torch.where(stored.isfinite().all(-1, keepdim=True), stored, torch.nan)


def encode_scale(scale: torch.Tensor) -> torch.Tensor:
    """Non-negative scales to their stored two bytes, float16 of the same shape; beyond 4.29e9 they become inf."""
    return scale.sqrt().to(SCALE_DTYPE)


def decode_scale(stored: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Undo `encode_scale` in the given type."""
    return stored.to(dtype).square()
