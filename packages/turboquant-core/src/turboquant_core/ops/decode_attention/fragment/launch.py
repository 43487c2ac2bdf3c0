"""Launch the fragment kernels: attend, combine."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any, cast

import torch

from turboquant_core.ops._card import overlapped
from turboquant_core.ops._page_layout import PageLayout
from turboquant_core.ops.decode_attention.call import AttendCall, AttendEnds, AttendTensors
from turboquant_core.ops.decode_attention.fragment.combine import combine_kernel
from turboquant_core.ops.decode_attention.fragment.kernel import fragment_kernel
from turboquant_core.ops.decode_attention.fragment.lookup import Lookup, key_lookup, split_key_lookup, value_lookup
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
        self.attend(tensors, ends.query, ends.transform, *ends.query.stride()[:2])
        self.combine(tensors, ends, ends.out.stride()[:2])


def plan(call: AttendCall) -> FragmentAttend:
    """The kernels with their grids, tables and options."""
    layout, sizes, counts = call.layout, call.sizes, call.counts
    launch = cast(FragmentLaunch, call.launch)
    head_dim, value_bits = layout.head_dim, layout.stored_values.bits
    key, value = _key_lookup(layout), value_lookup(head_dim, value_bits)
    group_dim = head_dim // len(key.groups)
    tables = _tables(head_dim, key, value_bits, call.device)
    common: dict[str, Any] = overlapped(launch.overlap)
    attend = partial(
        fragment_kernel[call.grid],
        **call.arguments(),
        negative=tables.query_negative,
        scale=call.scale,
        score_scale=call.scale * key.groups[0].unit / STEPS.value,
        table=tables.lookup,
        stages=launch.stages,
        rounds=tables.query_rounds,
        swaps=tuple(bit_swaps(key_channels(group_dim, numbers)) for numbers in key.groups),
        key_offsets=tuple(numbers.offset for numbers in key.groups),
        key_units=tuple(numbers.unit / key.groups[0].unit for numbers in key.groups),
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
        unit=value.groups[0].unit * head_dim ** (-tables.output_rounds / 2),
        rounds=tables.output_rounds,
        layout=layout,
        sizes=sizes,
        slots=launch.merge_slots,
        num_warps=launch.merge_warps,
        **common,
    )
    return FragmentAttend(attend, combine)


def _key_lookup(layout: PageLayout) -> Lookup:
    keys = layout.stored_keys
    return (split_key_lookup if keys.split else key_lookup)(layout.head_dim, keys.bits)


@dataclass(frozen=True)
class _Tables:
    """What the kernels read beside the cache.

    Attributes:
        lookup: int32 [constants, 32], the look-up constants of keys, then of values, for every lane.
        query_rounds: Of signs and transforms, in the rotation of keys.
        query_negative: int32 [head_dim], its signs, a bit for every round.
        output_rounds: The same of values.
        output_negative: The same of values, in the order of partial results.
        output_channels: int32 [head_dim], that order.
    """

    lookup: torch.Tensor
    query_rounds: int
    query_negative: torch.Tensor
    output_rounds: int
    output_negative: torch.Tensor
    output_channels: torch.Tensor


@cache
def _tables(head_dim: int, key: Lookup, value_bits: int, device: torch.device) -> _Tables:
    num_groups = len(key.groups)
    query_rounds, query_negative = _signs(head_dim // num_groups)
    output_rounds, output_negative = _signs(head_dim)
    channels = torch.tensor(value_channels(head_dim, value_bits), dtype=torch.int32, device="cpu")
    constants = (*key.table, *value_lookup(head_dim, value_bits).table)
    return _Tables(
        torch.tensor(constants, dtype=torch.int32, device=device)[:, None].repeat(1, 32),
        query_rounds,
        query_negative.repeat(num_groups).to(device),
        output_rounds,
        output_negative[channels].to(device),
        channels.to(device),
    )


def _signs(head_dim: int) -> tuple[int, torch.Tensor]:
    """Rounds of a rotation, and where it changes signs, a bit for every round, int32 [head_dim]."""
    signs = Rotation(head_dim).signs
    bit = torch.arange(len(signs), dtype=torch.int32, device="cpu")[:, None]
    return len(signs), ((signs < 0).int() << bit).sum(0, dtype=torch.int32)
