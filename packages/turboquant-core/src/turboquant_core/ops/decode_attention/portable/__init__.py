"""Decode attention in plain Triton: float16, int8 or fp8 products, with byte permutes or without."""

from functools import partial

from turboquant_core.ops._padding import padded_octet
from turboquant_core.ops.decode_attention.call import AttendCall
from turboquant_core.ops.decode_attention.path import Attend, DecodePath, Operand
from turboquant_core.ops.decode_attention.portable.sizes import portable_launch


def _plan(call: AttendCall, *, key_product: str, assembly: bool) -> Attend:
    from turboquant_core.ops.decode_attention.portable.launch import plan

    return plan(call, key_product=key_product, assembly=assembly)


def _operand(head_dim: int, key_bits: int, value_bits: int) -> Operand:
    """Channels in order, padded after every eighth; entries are those of unit variance."""
    octet = head_dim // 8
    padded = range(padded_octet(head_dim))
    channels = tuple(first + place if place < octet else -1 for first in range(0, head_dim, octet) for place in padded)
    return Operand(channels, channels, head_dim**-0.5, head_dim**-0.5)


def _path(name: str, key_product: str, capability: tuple[int, int] | None = None) -> DecodePath:
    plan = partial(_plan, key_product=key_product, assembly=capability is not None)
    return DecodePath(name=name, plan=plan, launch_of=portable_launch, operand=_operand, capability=capability)


FP16 = _path("fp16", "float16", (7, 5))
INT8 = _path("int8", "int8", (7, 5))
FP8 = _path("fp8", "fp8", (8, 9))
PORTABLE = _path("portable", "float16")
