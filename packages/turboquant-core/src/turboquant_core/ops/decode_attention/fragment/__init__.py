"""Decode attention in Gluon: INT8 keys and float16 values, looked up in the tensor cores' own registers."""

from turboquant_core.ops.decode_attention.call import AttendCall
from turboquant_core.ops.decode_attention.fragment.sizes import fragment_launch
from turboquant_core.ops.decode_attention.fragment.widths import STREAMS, SUBTILE
from turboquant_core.ops.decode_attention.path import Attend, DecodePath

# Copies are of sixteen bytes, and Triton sees strides to be multiples of sixteen.
ALIGNMENT = 16


def _plan(call: AttendCall) -> Attend:
    from turboquant_core.ops.decode_attention.fragment.launch import plan

    return plan(call)


FRAGMENT = DecodePath(
    name="fragment",
    plan=_plan,
    launch_of=fragment_launch,
    head_dims=(64, 128, 256),
    key_bits=tuple(STREAMS),
    value_bits=tuple(STREAMS),
    splits_keys=True,
    block_size_multiple=SUBTILE,
    capability=(8, 0),
    gluon="ampere",
    page_alignment=ALIGNMENT,
)
