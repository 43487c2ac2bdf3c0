"""Prefill: a chunk's tokens attend to each other as they are, and to what is stored through a bounded workspace."""

from dataclasses import dataclass, replace
from functools import cache

import torch

from turboquant_core import KVCacheLayout, Rotation
from turboquant_core.key_transform import KeyTransform
from turboquant_core.ops import cache_gather
from turboquant_vllm.batch.prefill_rows import ContextPart, PrefillRows
from turboquant_vllm.dense_attention import DenseAttention, merge
from turboquant_vllm.prefill.context_codes import attend_on_codes
from turboquant_vllm.prefill.raw_context import RawContext

Attended = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Prefill:
    """Prefill of one layer.

    Attributes:
        attention: Of dense keys and values.
        layout: Of the pages.
        sinks: [num_heads], or None.
    """

    attention: DenseAttention
    layout: KVCacheLayout
    sinks: torch.Tensor | None

    def __call__(
        self,
        query: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor] | None,
        pages: torch.Tensor,
        rows: PrefillRows,
        key_transform: KeyTransform,
        out: torch.Tensor,
        raw: RawContext | None = None,
    ) -> None:
        """Attend with all rows; their keys and values are stored already.

        Args:
            query: [num_tokens, num_heads, head_dim].
            own: Keys and values [num_tokens, num_kv_heads, head_dim], as given; None to read what is stored of them.
            pages: uint8 [num_blocks, num_kv_heads, head_bytes].
            rows: Of the query.
            key_transform: What stored keys went through.
            out: Like `query`, written.
            raw: What is raw of their contexts, or None.
        """
        # A softcap bends, and sinks compete with, the logits of whole keys. Else the mean's own score moves all logits
        # of a token alike: without it everywhere, nothing changes.
        sees_mean = bool(self.attention.softcap) or self.sinks is not None
        undone = key_transform if sees_mean else key_transform.without_mean()
        if not rows.max_context_len:
            key, value = own or self._own_as_stored(query, pages, rows, undone)
            self._own(query, key, value, rows, out)
            return
        if (mean := key_transform.mean) is not None and not sees_mean:
            if own is not None:
                own = torch.sub(own[0], mean, out=torch.empty_like(own[0])), own[1]
            if raw is not None:
                raw = replace(raw, key_mean=mean)
        if self.attention.window is not None:
            self._windowed(query, own, pages, rows, undone, out, raw)
            return
        key, value = own or self._own_as_stored(query, pages, rows, undone)
        on_own = self._own(query, key, value, rows)
        context = self._dequantised_context(query, pages, rows, undone, raw)
        if rows.groups is not None:
            on_codes = attend_on_codes(
                query,
                pages,
                rows.groups,
                self.layout,
                scale=self.attention.scale,
                softcap=self.attention.softcap,
                key_transform=undone,
                raw=raw,
            )
            context = on_codes if context is None else merge(context, on_codes)
        assert context is not None
        merge(context, on_own, out)

    def _own(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: PrefillRows,
        out: torch.Tensor | None = None,
    ) -> Attended:
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
            out=out,
        )

    def _own_as_stored(
        self, query: torch.Tensor, pages: torch.Tensor, rows: PrefillRows, undone: KeyTransform
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the rows' tokens, from their codes."""
        key, value, _ = cache_gather(
            pages,
            rows.block_table,
            rows.context_lens + rows.query_start_loc.diff(),
            self.layout,
            starts=rows.context_lens,
            cu_seqlens=rows.query_start_loc,
            key_transform=undone,
            dtype=query.dtype,
            max_tokens=rows.num_tokens,
        )
        return self._unrotated(key), self._unrotated(value)

    def _dequantised_context(
        self,
        query: torch.Tensor,
        pages: torch.Tensor,
        rows: PrefillRows,
        undone: KeyTransform,
        raw: RawContext | None,
    ) -> Attended | None:
        """Attention on the contexts of rows that are in no group, or None if there are none."""
        if not rows.context_parts:
            return None
        rotated = self._rotated(query)
        context: Attended | None = None
        for part in rows.context_parts:
            attended = self._stored(rotated, pages, rows, part, undone, raw, causal=False)
            context = attended if context is None else merge(context, attended)
            # It would be held until the next part's is there.
            del attended
        assert context is not None
        out, lse = context
        return self._unrotated(out), lse

    def _windowed(
        self,
        query: torch.Tensor,
        own: tuple[torch.Tensor, torch.Tensor] | None,
        pages: torch.Tensor,
        rows: PrefillRows,
        undone: KeyTransform,
        out: torch.Tensor,
        raw: RawContext | None,
    ) -> None:
        """Attention on what the windows reach, the rows' own tokens too: calls aligned at their ends."""
        assert self.attention.window is not None
        rotated = self._rotated(query)
        for part in rows.window_parts(self.attention.window):
            attended, _ = self._stored(
                rotated[part.tokens],
                pages,
                part.rows,
                part.reached,
                undone,
                None if raw is None else raw.of_window(part),
                own=None if own is None else (part.own, own[0][part.tokens], own[1][part.tokens]),
                causal=True,
                sinks=self.sinks,
            )
            out[part.tokens] = self._unrotated(attended)

    def _stored(
        self,
        rotated: torch.Tensor,
        pages: torch.Tensor,
        rows: PrefillRows,
        part: ContextPart,
        undone: KeyTransform,
        raw: RawContext | None,
        *,
        causal: bool,
        own: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
        sinks: torch.Tensor | None = None,
    ) -> Attended:
        """Attention of rotated queries on a part of what is stored; the output is rotated too.

        `own` says where in the part the rows' own tokens are, and their keys and values.
        """
        key, value, start_loc = cache_gather(
            pages,
            rows.block_table,
            part.ends,
            self.layout,
            starts=part.starts,
            cu_seqlens=part.start_loc,
            key_transform=undone,
            dtype=rotated.dtype,
            # One more row, where what is not of this part may be written.
            max_tokens=part.num_tokens + (raw is not None),
        )
        if raw is not None:
            raw.restore(key, value, part, self._rotated)
        if own is not None:
            at, own_key, own_value = own
            key[at], value[at] = self._rotated(own_key), self._rotated(own_value)
        return self.attention(
            rotated,
            key,
            value,
            rows.query_start_loc,
            start_loc,
            rows.max_query_len,
            part.max_len,
            causal=causal,
            sinks=sinks,
        )

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
