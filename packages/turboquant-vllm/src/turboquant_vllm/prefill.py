"""Prefill: a chunk's tokens attend to each other as they are, and to what is stored through a bounded workspace."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from turboquant_core import KVCacheLayout, Rotation
from turboquant_core.ops import cache_gather
from turboquant_vllm.metadata import PrefillRows
from turboquant_vllm.varlen import VarlenAttention, merge

# Stored tokens that are dequantised at a time. Attention on fewer would not fill a GPU; of 8 KV heads with 128 channels
# they take 128 MiB.
WORKSPACE_TOKENS = 32 * 1024

Attended = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Prefill:
    """Prefill of one layer.

    Attributes:
        attention: Of dense keys and values.
        layout: Of the pages.
        sinks: [num_heads], or None.
    """

    attention: VarlenAttention
    layout: KVCacheLayout
    sinks: torch.Tensor | None

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        rows: PrefillRows,
        key_mean: torch.Tensor | None,
    ) -> torch.Tensor:
        """The output of all rows; their keys and values are stored already.

        Args:
            query: [num_tokens, num_heads, head_dim].
            key: [num_tokens, num_kv_heads, head_dim], as given.
            value: The same for values.
            pages: uint8 [num_blocks, num_kv_heads, head_bytes].
            rows: Of the query.
            key_mean: float32 [num_kv_heads, head_dim], subtracted from stored keys; None if none was.
        """
        if not rows.max_context_len:
            return self._own(query, key, value, rows)[0]
        if self.attention.window is not None:
            return self._windowed(query, pages, rows, key_mean)
        own = self._own(query, key, value, rows)
        rotated = self._rotated(query)
        context: Attended | None = None
        for part in self._context_parts(rotated, pages, rows, key_mean):
            context = part if context is None else merge(context, part, on_gpu=query.is_cuda)
        assert context is not None
        out, lse = context
        if key_mean is not None and not self.attention.softcap:
            # The mean's own score moves all logits on the context alike.
            lse = lse + self.attention.scale * _mean_scores(query, key_mean)
        return merge((self._unrotated(out), lse), own, on_gpu=query.is_cuda)[0]

    def _own(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rows: PrefillRows) -> Attended:
        """Attention of the rows' tokens on each other; the sinks count here."""
        return self.attention(
            query,
            key,
            value,
            rows.query_start_loc,
            rows.query_start_loc,
            rows.max_query_len,
            rows.max_query_len,
            causal=True,
            sinks=self.sinks,
        )

    def _context_parts(
        self,
        rotated: torch.Tensor,
        pages: torch.Tensor,
        rows: PrefillRows,
        key_mean: torch.Tensor | None,
    ) -> Iterator[Attended]:
        """Attention on the contexts, equally many tokens of every row at a time."""
        step = max(1, WORKSPACE_TOKENS // len(rows.context_lens_cpu))
        for start in range(0, rows.max_context_len, step):
            lens = [min(max(length - start, 0), step) for length in rows.context_lens_cpu]
            ends = rows.context_lens.clamp(max=start + step)
            starts = torch.full_like(ends, start).minimum(ends)
            key, value, start_loc = self._gather(pages, rows, starts, ends, sum(lens), rotated.dtype, key_mean)
            yield self.attention(
                rotated, key, value, rows.query_start_loc, start_loc, rows.max_query_len, max(lens), causal=False
            )

    def _windowed(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        rows: PrefillRows,
        key_mean: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention on what the windows reach, the rows' own tokens as stored too: one call, aligned at its end."""
        assert self.attention.window is not None
        before = self.attention.window - 1
        starts = (rows.context_lens - before).clamp(min=0)
        ends = rows.context_lens + rows.query_start_loc.diff()
        lens = [
            min(context, before) + own for context, own in zip(rows.context_lens_cpu, rows.query_lens_cpu, strict=True)
        ]
        key, value, start_loc = self._gather(
            pages, rows, starts, ends, sum(lens), query.dtype, key_mean, add_mean=self.sinks is not None
        )
        out, _ = self.attention(
            self._rotated(query),
            key,
            value,
            rows.query_start_loc,
            start_loc,
            rows.max_query_len,
            max(lens),
            causal=True,
            sinks=self.sinks,
        )
        return self._unrotated(out)

    def _gather(
        self,
        pages: torch.Tensor,
        rows: PrefillRows,
        starts: torch.Tensor,
        ends: torch.Tensor,
        num_tokens: int,
        dtype: torch.dtype,
        key_mean: torch.Tensor | None,
        *,
        add_mean: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # A softcap bends, and a sink competes with, the logits of whole keys; rounded once, they lose the least.
        whole = key_mean is not None and (add_mean or bool(self.attention.softcap))
        key, value, start_loc = cache_gather(
            pages,
            rows.block_table,
            ends,
            self.layout,
            starts=starts,
            dtype=torch.float32 if whole else dtype,
            max_tokens=num_tokens,
        )
        if whole:
            assert key_mean is not None
            key, value = (key + self._rotation.rotate(key_mean)).to(dtype), value.to(dtype)
        return key, value, start_loc

    @property
    def _rotation(self) -> Rotation:
        return Rotation(self.layout.config.head_dim)

    def _rotated(self, vectors: torch.Tensor) -> torch.Tensor:
        # Rounded once: a rotation rounded to 16 bits would cost as much accuracy again.
        return self._rotation.rotate(vectors).to(vectors.dtype)

    def _unrotated(self, vectors: torch.Tensor) -> torch.Tensor:
        return self._rotation.unrotate(vectors).to(vectors.dtype)


def _mean_scores(query: torch.Tensor, key_mean: torch.Tensor) -> torch.Tensor:
    """The product of every query head with its KV head's mean, float32 [num_heads, num_tokens]."""
    num_tokens, num_heads, head_dim = query.shape
    grouped = query.reshape(num_tokens, len(key_mean), -1, head_dim)
    return torch.einsum("tkgd,kd->kgt", grouped.float(), key_mean).reshape(num_heads, num_tokens)
