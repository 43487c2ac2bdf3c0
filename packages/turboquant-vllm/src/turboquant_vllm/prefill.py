"""Prefill: a chunk's tokens attend to each other as they are, and to what is stored through a bounded workspace."""

from dataclasses import dataclass
from functools import cache

import torch

from turboquant_core import KVCacheLayout, Rotation
from turboquant_core.ops import cache_gather
from turboquant_vllm.grouped import attend_in_groups
from turboquant_vllm.prefill_rows import ContextPart, PrefillRows
from turboquant_vllm.varlen import VarlenAttention, merge

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
        context = self._dequantised_context(query, pages, rows, key_mean)
        if rows.groups is not None:
            on_codes = attend_in_groups(
                query,
                pages,
                rows.groups,
                self.layout,
                scale=self.attention.scale,
                softcap=self.attention.softcap,
                key_mean=key_mean,
            )
            context = on_codes if context is None else merge(context, on_codes, on_gpu=query.is_cuda)
        assert context is not None
        return merge(context, own, on_gpu=query.is_cuda)[0]

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

    def _dequantised_context(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        rows: PrefillRows,
        key_mean: torch.Tensor | None,
    ) -> Attended | None:
        """Attention on the contexts of rows that are in no group, or None if there are none."""
        if not rows.context_parts:
            return None
        rotated = self._rotated(query)
        context: Attended | None = None
        for part in rows.context_parts:
            key, value, start_loc = self._gather(pages, rows, part, query.dtype, key_mean)
            attended = self.attention(
                rotated, key, value, rows.query_start_loc, start_loc, rows.max_query_len, part.max_len, causal=False
            )
            context = attended if context is None else merge(context, attended, on_gpu=query.is_cuda)
        assert context is not None
        out, lse = context
        if key_mean is not None and not self.attention.softcap:
            # The mean's own score moves all logits on the context alike.
            lse = lse + self.attention.scale * _mean_scores(query, key_mean)
        return self._unrotated(out), lse

    def _windowed(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        rows: PrefillRows,
        key_mean: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention on what the windows reach, the rows' own tokens as stored too: one call, aligned at its end."""
        assert self.attention.window is not None
        part = rows.window_part(self.attention.window)
        key, value, start_loc = self._gather(pages, rows, part, query.dtype, key_mean, add_mean=self.sinks is not None)
        out, _ = self.attention(
            self._rotated(query),
            key,
            value,
            rows.query_start_loc,
            start_loc,
            rows.max_query_len,
            part.max_len,
            causal=True,
            sinks=self.sinks,
        )
        return self._unrotated(out)

    def _gather(
        self,
        pages: torch.Tensor,
        rows: PrefillRows,
        part: ContextPart,
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
            part.ends,
            self.layout,
            starts=part.starts,
            dtype=torch.float32 if whole else dtype,
            max_tokens=part.num_tokens,
        )
        if whole:
            assert key_mean is not None
            key, value = (key + self._rotation.rotate(key_mean)).to(dtype), value.to(dtype)
        return key, value, start_loc

    @property
    def _rotation(self) -> Rotation:
        return Rotation(self.layout.config.head_dim)

    def _rotated(self, vectors: torch.Tensor) -> torch.Tensor:
        matrix = _exact_matrix(self._rotation, vectors.dtype, vectors.device)
        # Rounded once: a rotation rounded to 16 bits would cost as much accuracy again.
        return self._rotation.rotate(vectors).to(vectors.dtype) if matrix is None else vectors @ matrix.T

    def _unrotated(self, vectors: torch.Tensor) -> torch.Tensor:
        matrix = _exact_matrix(self._rotation, vectors.dtype, vectors.device)
        return self._rotation.unrotate(vectors).to(vectors.dtype) if matrix is None else vectors @ matrix


@cache
def _exact_matrix(rotation: Rotation, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """The rotation in a type that holds every entry of it, for one product of the type's own; None if it does not."""
    matrix = rotation.matrix.to(dtype)
    return matrix.to(device) if torch.equal(matrix.double(), rotation.matrix) else None


def _mean_scores(query: torch.Tensor, key_mean: torch.Tensor) -> torch.Tensor:
    """The product of every query head with its KV head's mean, float32 [num_heads, num_tokens]."""
    num_tokens, num_heads, head_dim = query.shape
    grouped = query.reshape(num_tokens, len(key_mean), -1, head_dim)
    return torch.einsum("tkgd,kd->kgt", grouped.float(), key_mean).reshape(num_heads, num_tokens)
