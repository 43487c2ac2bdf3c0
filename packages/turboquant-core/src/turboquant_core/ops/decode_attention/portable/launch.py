"""Launch the portable kernels: prepare, attend, combine."""

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch

from turboquant_core.ops._card import card_of, float32_precision, overlapped
from turboquant_core.ops._dispatch import interpreting
from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops.decode_attention.call import AttendCall, AttendEnds, AttendTensors
from turboquant_core.ops.decode_attention.centroids import MAX_PERMUTED_BITS
from turboquant_core.ops.decode_attention.portable.combine import combine_kernel
from turboquant_core.ops.decode_attention.portable.kernel import portable_kernel
from turboquant_core.ops.decode_attention.portable.lookup import entries, entry_unit, entry_words
from turboquant_core.ops.decode_attention.portable.prepare import prepare_kernel
from turboquant_core.ops.decode_attention.portable.sizes import PortableLaunch
from turboquant_core.rotation import Rotation

# They hold a rotation of 128 channels while they wait.
MERGE_WARPS = 8


@dataclass(frozen=True)
class PortableAttend:
    """The launches of a planned call.

    Attributes:
        call: What is known of it.
        prepare: Rotates the query, and lays the tiles of all rows in one line.
        attend: Writes partial results.
        combine: Merges them.
    """

    call: AttendCall
    prepare: "partial[None]"
    attend: "partial[None]"
    combine: "partial[None]"

    def __call__(self, tensors: AttendTensors, ends: AttendEnds) -> None:
        """See `Attend`."""
        sizes = self.call.sizes
        columns = (self.call.counts.batch, self.call.layout.num_kv_heads, sizes.num_columns)
        operand = torch.empty(*columns, sizes.num_positions, dtype=torch.float16, device=self.call.device)
        factor = torch.empty(columns, dtype=torch.float32, device=self.call.device)
        self.prepare(tensors, operand, factor, ends.query, ends.transform, *ends.query.stride()[:2])
        self.attend(tensors, operand, factor)
        self.combine(tensors, ends, ends.out.stride()[:2])


def plan(call: AttendCall, *, key_product: str, assembly: bool) -> PortableAttend:
    """The kernels with their grids, tables and options.

    Args:
        call: What is known of a call.
        key_product: What queries and keys are multiplied in: "float16", "int8" or "fp8".
        assembly: Whether inline assembly looks centroids up where codes are narrow enough.
    """
    # The interpreter has no inline assembly: there every path looks the same entries up by gathering.
    assembly = assembly and not interpreting()
    layout, sizes, counts, device = call.layout, call.sizes, call.counts, call.device
    launch = cast(PortableLaunch, call.launch)
    head_dim, value_bits = layout.head_dim, layout.stored_values.bits
    key_widths = layout.stored_keys.widths
    group_dim = head_dim // len(key_widths)
    key_permutes = tuple(assembly and bits <= MAX_PERMUTED_BITS for bits in key_widths)
    value_permute = assembly and value_bits <= MAX_PERMUTED_BITS
    heads = counts.batch * counts.query_len * layout.num_kv_heads * sizes.group
    block_positions = min(launch.prepare_positions, sizes.num_positions)
    common: dict[str, Any] = {
        "batch": counts.batch,
        "num_tokens": counts.num_tokens,
        "query_len": counts.query_len,
        "layout": layout,
        "sizes": sizes,
        "block_dim": sizes.num_positions,
        "precision": float32_precision(card_of(device)),
        **overlapped(launch.overlap),
    }
    prepare = partial(
        prepare_kernel[(-(-heads // launch.prepare_heads), sizes.num_positions // block_positions)],
        rotation=_query_rotation(head_dim, len(key_widths), device),
        row_capacity=counts.row_capacity,
        scale=call.scale,
        score_scale=call.scale * group_dim**-0.5,
        block_heads=launch.prepare_heads,
        block_channels=min(launch.prepare_channels, sizes.num_positions),
        block_positions=block_positions,
        num_warps=4,
        **common,
    )
    attend = partial(
        portable_kernel[call.grid],
        **call.arguments(),
        key_entries=tuple(
            (entry_words if permute else entries)(group_dim, bits, key_product, device)
            for bits, permute in zip(key_widths, key_permutes, strict=True)
        ),
        value_entries=(entry_words if value_permute else entries)(head_dim, value_bits, "float16", device),
        key_units=tuple(entry_unit(group_dim, bits, key_product) for bits in key_widths),
        padded_octet=padded_octet(head_dim),
        key_product=key_product,
        key_permutes=key_permutes,
        value_permute=value_permute,
        widen=interpreting(),
        num_warps=launch.num_warps,
        **overlapped(launch.overlap),
    )
    combine = partial(
        combine_kernel[(-(-heads // launch.merge_heads),)],
        rotation=_output_rotation(head_dim, device),
        num_workers=launch.num_workers,
        block_heads=launch.merge_heads,
        block_slots=launch.merge_slots,
        block_channels=min(launch.merge_channels, sizes.num_positions),
        num_warps=MERGE_WARPS,
        **common,
    )
    return PortableAttend(call, prepare, attend, combine)


@cache
def _query_rotation(head_dim: int, num_groups: int, device: torch.device) -> torch.Tensor:
    """Π of each of the groups that channels are in, float32 [num_positions, head_dim]."""
    each = torch.eye(num_groups, dtype=torch.float64, device="cpu")
    matrix: torch.Tensor = torch.kron(each, _at_positions(head_dim // num_groups))
    return matrix.float().to(device)


@cache
def _output_rotation(head_dim: int, device: torch.device) -> torch.Tensor:
    """Π times the unit of centroids, whose entries are those of unit variance, float32 [num_positions, head_dim]."""
    return (_at_positions(head_dim) / math.sqrt(head_dim)).float().to(device)


def _at_positions(head_dim: int) -> torch.Tensor:
    """Π, float64 [num_positions, head_dim], with rows of zeros where channels are padded after every eighth."""
    octet, padded = head_dim // 8, padded_octet(head_dim)
    matrix = torch.zeros(8, padded, head_dim, dtype=torch.float64, device="cpu")
    matrix[:, :octet] = Rotation(head_dim).matrix.view(8, octet, head_dim)
    return matrix.flatten(0, 1)
