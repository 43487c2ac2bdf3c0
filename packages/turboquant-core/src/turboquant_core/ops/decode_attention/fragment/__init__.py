"""Decode attention in Gluon: float16 centroids looked up in the tensor cores' own registers."""

from turboquant_core.ops.decode_attention.call import AttendCall
from turboquant_core.ops.decode_attention.fragment.sizes import fragment_launch
from turboquant_core.ops.decode_attention.fragment.widths import SUBTILE, WIDTHS
from turboquant_core.ops.decode_attention.path import Attend, DecodePath

# Strides in words, and in scales, that Triton sees to be multiples of sixteen.
ALIGNMENT = 64


def _plan(call: AttendCall) -> Attend:
    from turboquant_core.ops.decode_attention.fragment.launch import plan

    return plan(call)


def _positions(head_dim: int, key_bits: int, value_bits: int) -> tuple[list[int], list[int]]:
    from turboquant_core.ops.decode_attention.fragment.operands import operand_channels

    return operand_channels(head_dim, key_bits, value_bits)


FRAGMENT = DecodePath(
    name="fragment",
    plan=_plan,
    launch_of=fragment_launch,
    positions=_positions,
    head_dims=(64, 128, 256),
    key_bits=tuple(WIDTHS),
    # Its polynomial misses the outermost centroids of 8 bits by more than a short row of values averages out.
    value_bits=tuple(bits for bits in WIDTHS if bits < 8),
    block_size_multiple=SUBTILE,
    capability=(8, 0),
    gluon="ampere",
    page_alignment=ALIGNMENT,
)
