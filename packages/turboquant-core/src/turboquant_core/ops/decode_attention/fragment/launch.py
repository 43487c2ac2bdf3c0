"""Launch the fragment kernel."""

from functools import cache, partial

import torch

from turboquant_core.ops.decode_attention.call import AttendCall
from turboquant_core.ops.decode_attention.fragment.kernel import fragment_kernel
from turboquant_core.ops.decode_attention.fragment.lookup import key_lookup, value_lookup
from turboquant_core.ops.decode_attention.sizes import overlapped


def plan(call: AttendCall) -> "partial[None]":
    """The kernel with its grid, tables and options: what `DecodePath.plan` gives."""
    layout, sizes = call.layout, call.launch
    head_dim, key_bits, value_bits = layout.head_dim, layout.stored_keys.bits, layout.stored_values.bits
    key, value = key_lookup(head_dim, key_bits), value_lookup(head_dim, value_bits)
    return partial(
        fragment_kernel[call.grid],
        **call.arguments(),
        table=_table(head_dim, key_bits, value_bits, call.device),
        stages=sizes.stages,
        key_asm=key.asm,
        key_constraints=key.constraints,
        key_constants=len(key.table),
        value_asm=value.asm,
        value_constraints=value.constraints,
        value_constants=len(value.table),
        num_warps=1,
        **overlapped(sizes),
    )


@cache
def _table(head_dim: int, key_bits: int, value_bits: int, device: torch.device) -> torch.Tensor:
    constants = (*key_lookup(head_dim, key_bits).table, *value_lookup(head_dim, value_bits).table)
    return torch.tensor(constants, dtype=torch.int32, device=device)[:, None].repeat(1, 32)
