"""Launch the fragment kernels: attend, combine."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch

from turboquant_core.ops.decode_attention.call import AttendCall, AttendEnds, AttendTensors, query_strides
from turboquant_core.ops.decode_attention.card import overlapped
from turboquant_core.ops.decode_attention.fragment.combine import combine_kernel
from turboquant_core.ops.decode_attention.fragment.kernel import fragment_kernel
from turboquant_core.ops.decode_attention.fragment.lookup import key_lookup, value_lookup
from turboquant_core.ops.decode_attention.fragment.positions import bit_swaps, key_channels, value_channels
from turboquant_core.ops.decode_attention.fragment.query import STEPS
from turboquant_core.ops.decode_attention.fragment.sizes import FragmentLaunch
from turboquant_core.rotation import Rotation


@dataclass(frozen=True)
class FragmentAttend:
    """The launches of a planned call.

    Attributes:
        attend: Rotates queries, and writes partial results.
        combine: Merges them.
    """

    attend: "partial[None]"
    combine: "partial[None]"

    def __call__(self, tensors: AttendTensors, ends: AttendEnds) -> None:
        """See `Attend`."""
        self.attend(tensors, ends.query, ends.key_mean, *query_strides(ends))
        self.combine(tensors, ends, ends.out.stride()[:2])


def plan(call: AttendCall) -> FragmentAttend:
    """The kernels with their grids, tables and options."""
    layout, sizes, counts = call.layout, call.sizes, call.counts
    launch = cast(FragmentLaunch, call.launch)
    head_dim, key_bits, value_bits = layout.head_dim, layout.stored_keys.bits, layout.stored_values.bits
    key, value = key_lookup(head_dim, key_bits), value_lookup(head_dim, value_bits)
    tables = _tables(head_dim, key_bits, value_bits, call.device)
    common: dict[str, Any] = {"rounds": tables.rounds, **overlapped(launch)}
    attend = partial(
        fragment_kernel[call.grid],
        **call.arguments(),
        negative=tables.query_negative,
        scale=call.scale,
        score_scale=call.scale * key.unit / STEPS.value,
        table=tables.lookup,
        stages=launch.stages,
        swaps=bit_swaps(key_channels(head_dim, key_bits)),
        key_offset=key.offset,
        key_asm=key.asm,
        key_constraints=key.constraints,
        key_constants=len(key.table),
        value_asm=value.asm,
        value_constraints=value.constraints,
        value_constants=len(value.table),
        num_warps=1,
        maxnreg=launch.max_registers,
        **common,
    )
    combine = partial(
        combine_kernel[(counts.batch * counts.query_len * layout.num_kv_heads * sizes.group,)],
        batch=counts.batch,
        num_tokens=counts.num_tokens,
        query_len=counts.query_len,
        num_workers=launch.num_workers,
        negative=tables.output_negative,
        channels=tables.output_channels,
        # A power of two.
        unit=value.unit * head_dim ** (-common["rounds"] / 2),
        layout=layout,
        sizes=sizes,
        slots=launch.merge_slots,
        num_warps=launch.merge_warps,
        **common,
    )
    return FragmentAttend(attend, combine)


@dataclass(frozen=True)
class _Tables:
    """What the kernels read beside the cache.

    Attributes:
        rounds: Of signs and transforms.
        lookup: int32 [constants, 32], the look-up constants of keys, then of values, for every lane.
        query_negative: int32 [head_dim], the signs of the rotation, a bit for every round.
        output_negative: The same in the order of partial results.
        output_channels: int32 [head_dim], that order.
    """

    rounds: int
    lookup: torch.Tensor
    query_negative: torch.Tensor
    output_negative: torch.Tensor
    output_channels: torch.Tensor


@cache
def _tables(head_dim: int, key_bits: int, value_bits: int, device: torch.device) -> _Tables:
    constants = (*key_lookup(head_dim, key_bits).table, *value_lookup(head_dim, value_bits).table)
    signs = Rotation(head_dim).signs
    bit = torch.arange(len(signs), dtype=torch.int32, device="cpu")[:, None]
    negative = ((signs < 0).int() << bit).sum(0, dtype=torch.int32)
    channels = torch.tensor(value_channels(head_dim, value_bits), dtype=torch.int32, device="cpu")
    return _Tables(
        len(signs),
        torch.tensor(constants, dtype=torch.int32, device=device)[:, None].repeat(1, 32),
        negative.to(device),
        negative[channels].to(device),
        channels.to(device),
    )
