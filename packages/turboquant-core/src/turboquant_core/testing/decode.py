"""Decode attention to test and to measure: a cache with garbage around what it stores, and eager attention on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from turboquant_core.config import TurboQuantConfig
from turboquant_core.key_transform import KeyTransform
from turboquant_core.layout import KVCacheLayout
from turboquant_core.ops.cache_update.reference import cache_update
from turboquant_core.ops.decode_attention.reference import decode_attention, stored_row

# As float16 scales these bytes are NaN, so whoever uses one of them shows it.
POISON = 0xFF
# No cache has such a block: whoever reads it gets the last one, which holds nothing but poison.
UNUSED_BLOCK = 2**30
SPARE_BLOCKS = 3


@dataclass(frozen=True)
class DecodeCase:
    """The sizes and options of one call.

    Attributes:
        head_dim: Dimension of every head.
        key_bits: Bits of a key coordinate.
        value_bits: Bits of a value coordinate.
        key_split: Whether keys are split.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        block_size: Tokens of a page; pages of a contiguous cache hold the longest row, rounded up to sixteen.
        seq_lens: Stored tokens of every row.
        query_lens: Query tokens of every row: one number for all of them, or one for each, as query_start_loc.
        dtype: The query's type.
        paged: Whether there is a block table; without one row b is page b.
        scale: What logits are multiplied with, or None.
        seq_starts: The first position of every row that may be seen, or None.
        seq_ends: One past the last position of every row that may be seen, or None; nothing is stored from there on.
        window: Positions that a token sees, or None.
        softcap: The bound of logits, or None.
        sinks: Whether every head has a sink.
        key_mean: Whether keys were stored without their mean.
        key_scale: Whether channels were scaled.
        key_channel_order: Whether channels were stored in another order.
    """

    head_dim: int = 128
    key_bits: int = 4
    value_bits: int = 4
    key_split: bool = False
    num_heads: int = 4
    num_kv_heads: int = 1
    block_size: int = 16
    seq_lens: tuple[int, ...] = (40,)
    query_lens: int | tuple[int, ...] = 1
    dtype: torch.dtype = torch.float32
    paged: bool = True
    scale: float | None = None
    seq_starts: tuple[int, ...] | None = None
    seq_ends: tuple[int, ...] | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    key_mean: bool = False
    key_scale: bool = False
    key_channel_order: bool = False

    @property
    def layout(self) -> KVCacheLayout:
        """The layout of the pages."""
        config = TurboQuantConfig(self.head_dim, self.key_bits, self.value_bits, key_split=self.key_split)
        longest = -(-max(1, *self.seq_lens) // 16) * 16
        return KVCacheLayout(config, self.num_kv_heads, self.block_size if self.paged else longest)

    @property
    def stored_lens(self) -> tuple[int, ...]:
        """Tokens of every row whose codes the pages hold."""
        ends = self.seq_ends or self.seq_lens
        return tuple(min(max(end, 0), length) for end, length in zip(ends, self.seq_lens, strict=True))

    @property
    def row_lens(self) -> tuple[int, ...]:
        """Query tokens of every row."""
        return (self.query_lens,) * len(self.seq_lens) if isinstance(self.query_lens, int) else self.query_lens


@dataclass(frozen=True)
class DecodeInputs:
    """The tensors of a case.

    Attributes:
        case: What they were built for.
        query: [num_tokens, num_heads, head_dim].
        pages: uint8 [num_blocks, num_kv_heads, head_bytes].
        block_table: int32 [batch, max_blocks], or None.
        seq_lens: int32 [batch].
        options: The keyword arguments of `turboquant_core.ops.decode_attention.decode_attention`.
    """

    case: DecodeCase
    query: torch.Tensor
    pages: torch.Tensor
    block_table: torch.Tensor | None
    seq_lens: torch.Tensor
    options: dict[str, Any]

    def reference_options(self) -> dict[str, Any]:
        """The keyword arguments of the reference and of the launcher, which take no None for a number."""
        options = {name: value for name, value in self.options.items() if name != "max_query_len"}
        options["scale"] = self.case.head_dim**-0.5 if self.case.scale is None else self.case.scale
        options |= {"window": self.case.window or 0, "softcap": self.case.softcap or 0.0}
        return options | {"query_len": max(self.case.row_lens, default=0)}

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output and log-sum-exp of the reference in float64."""
        arguments = (self.pages, self.block_table, self.seq_lens, self.case.layout)
        return decode_attention(self.query.double(), *arguments, **self.reference_options())

    def eager(self, rounded: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Attention on dequantised keys and values, in float64 with every tensor that a model would keep `rounded`."""
        case, layout = self.case, self.case.layout
        options = self.reference_options()
        query, group = rounded(self.query.double()), case.num_heads // case.num_kv_heads
        out = torch.zeros_like(query)
        first = 0
        for row, (length, row_len) in enumerate(zip(case.seq_lens, case.row_lens, strict=True)):
            keys, values = stored_row(self.pages, self.block_table, row, length, layout, torch.float64)
            keys = options["key_transform"].restored(keys.transpose(0, 1)).transpose(0, 1)
            keys, values = (rounded(x).repeat_interleave(group, dim=0) for x in (keys, values))
            for token in range(row_len):
                end = max(length - row_len + token + 1, 0)
                start = max(case.seq_starts[row] if case.seq_starts else 0, end - case.window if case.window else 0)
                end = min(end, case.stored_lens[row])
                seen = slice(min(start, end), end)
                scores = rounded(torch.einsum("hd,htd->ht", query[first + token], keys[:, seen]) * options["scale"])
                if case.softcap:
                    scores = rounded(rounded(torch.tanh(rounded(scores / case.softcap))) * case.softcap)
                if case.sinks:
                    scores = torch.cat([scores, rounded(options["sinks"].double())[:, None]], dim=-1)
                weights = rounded(scores.softmax(-1))[:, : seen.stop - seen.start]
                out[first + token] = rounded(torch.einsum("ht,htd->hd", weights, values[:, seen]))
            first += row_len
        return out

    def eager_bfloat16(self) -> torch.Tensor:
        """What a bfloat16 model computes: query, keys, values, scores, weights and output rounded to bfloat16."""
        return self.eager(lambda x: x.bfloat16().double())


def build(case: DecodeCase, device: torch.device, seed: int = 0) -> DecodeInputs:
    """Gaussian queries, and pages in random order that store Gaussian keys and values, all else being poison."""
    layout, batch = case.layout, len(case.seq_lens)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def int32(values: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    blocks = [-(-length // layout.block_size) for length in case.seq_lens]
    num_blocks = sum(blocks) + SPARE_BLOCKS if case.paged else batch
    order = torch.randperm(num_blocks - 1 if case.paged else num_blocks, generator=generator, device=device)
    table = torch.full((batch, max(blocks, default=0) + 1), UNUSED_BLOCK, dtype=torch.int32, device=device)
    pages = layout.allocate(num_blocks, device).fill_(POISON)
    mean = 2 * normal(case.num_kv_heads, case.head_dim) if case.key_mean else None
    scale = (normal(case.num_kv_heads, case.head_dim) / 2).exp() if case.key_scale else None
    order_of_channels = normal(case.num_kv_heads, case.head_dim).argsort(-1) if case.key_channel_order else None
    transform = KeyTransform(mean, scale, order_of_channels)
    for row, length in enumerate(case.stored_lens):
        own = order[sum(blocks[:row]) : sum(blocks[: row + 1])] if case.paged else order.new_tensor([row])
        table[row, : len(own)] = own
        token = torch.arange(length, device=device)
        slots = own[token // layout.block_size] * layout.block_size + token % layout.block_size
        key, value = (normal(length, case.num_kv_heads, case.head_dim) for _ in range(2))
        cache_update(key if mean is None else key + mean, value, pages, slots, layout, key_transform=transform)
    options: dict[str, Any] = {
        "scale": case.scale,
        "query_start_loc": None,
        "max_query_len": None,
        "seq_starts": None if case.seq_starts is None else int32(case.seq_starts),
        "seq_ends": None if case.seq_ends is None else int32(case.seq_ends),
        "window": case.window,
        "softcap": case.softcap,
        "sinks": normal(case.num_heads) if case.sinks else None,
        "key_transform": transform,
    }
    if not isinstance(case.query_lens, int):
        ends = int32((0, *case.query_lens)).cumsum(0, dtype=torch.int32)
        options |= {"query_start_loc": ends, "max_query_len": max(case.query_lens)}
    query = normal(sum(case.row_lens), case.num_heads, case.head_dim).to(case.dtype)
    return DecodeInputs(case, query, pages, table if case.paged else None, int32(case.seq_lens), options)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The length of the difference over that of `expected`."""
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
