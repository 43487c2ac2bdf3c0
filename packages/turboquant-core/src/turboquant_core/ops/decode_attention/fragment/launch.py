"""Launch the fragment kernel."""

from dataclasses import replace
from functools import cache

import torch

from turboquant_core.layout import PageViews
from turboquant_core.ops.decode_attention.call import AttendCall
from turboquant_core.ops.decode_attention.fragment.kernel import fragment_kernel
from turboquant_core.ops.decode_attention.fragment.lookup import lookup
from turboquant_core.ops.decode_attention.fragment.widths import SUBTILE
from turboquant_core.ops.decode_attention.sizes import overlapped


def launch(call: AttendCall) -> None:
    """Write the partial results of a call."""
    config, sizes = call.layout.config, call.launch
    head_dim, key_bits, value_bits = config.head_dim, int(config.key_bits), int(config.value_bits)
    key, value = lookup(head_dim, key_bits), lookup(head_dim, value_bits)
    fragment_kernel[call.grid](
        **call.arguments(_in_words(call.layout.views(call.pages))),
        table=_table(head_dim, key_bits, value_bits, call.operand.device),
        subtiles=sizes.tile // SUBTILE,
        stages=sizes.stages,
        key_asm=key.key_asm,
        key_constraints=key.key_constraints,
        key_constants=len(key.table),
        value_asm=value.value_asm,
        value_constraints=value.value_constraints,
        value_constants=len(value.table),
        num_warps=1,
        **overlapped(sizes),
    )


def _in_words(views: PageViews) -> PageViews:
    """The same with codes as int32 words, without copying."""
    key_codes, value_codes = (codes.view(torch.int32) for codes in (views.key_codes, views.value_codes))
    return replace(views, key_codes=key_codes, value_codes=value_codes)


@cache
def _table(head_dim: int, key_bits: int, value_bits: int, device: torch.device) -> torch.Tensor:
    constants = (*lookup(head_dim, key_bits).table, *lookup(head_dim, value_bits).table)
    return torch.tensor(constants, dtype=torch.int32, device=device)[:, None].repeat(1, 32)
