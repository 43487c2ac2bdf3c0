"""Decode attention in plain Triton: float16, int8 or fp8 products, with byte permutes or without."""

from functools import partial

from turboquant_core.ops.decode_attention.call import AttendCall
from turboquant_core.ops.decode_attention.path import Attend, DecodePath
from turboquant_core.ops.decode_attention.portable.sizes import portable_launch


def _plan(call: AttendCall, *, key_product: str, assembly: bool) -> Attend:
    from turboquant_core.ops.decode_attention.portable.launch import plan

    return plan(call, key_product=key_product, assembly=assembly)


def _path(name: str, key_product: str, capability: tuple[int, int] | None = None) -> DecodePath:
    plan = partial(_plan, key_product=key_product, assembly=capability is not None)
    return DecodePath(name=name, plan=plan, launch_of=portable_launch, capability=capability, splits_keys=True)


FP16 = _path("fp16", "float16", (7, 5))
INT8 = _path("int8", "int8", (7, 5))
FP8 = _path("fp8", "fp8", (8, 9))
PORTABLE = _path("portable", "float16")
