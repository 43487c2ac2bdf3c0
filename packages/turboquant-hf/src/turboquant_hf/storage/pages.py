"""The codes of a layer, in pages that core's kernels read.

The rows of a batch have equally many heads, and tokens at equal slots. Pages are uint8 [num_blocks, batch_size *
num_kv_heads, head_bytes] in core's layout: token t of every row is slot t % BLOCK_SIZE of page t // BLOCK_SIZE. For
core's operations that is one row of batch_size * num_kv_heads heads, which is how tokens are written, or batch_size
rows whose pages take turns, which is how they are attended to.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from functools import lru_cache
from typing import Any, Self

import torch

from turboquant_core import KVCacheLayout, TurboQuantConfig
from turboquant_core.key_transform import IDENTITY, KeyTransform
from turboquant_core.ops import cache_update, decode_attention
from turboquant_hf.storage.codec import LayerCodec, of_equal_rows
from turboquant_hf.storage.length import Length
from turboquant_hf.storage.tables import Seen, Written
from turboquant_hf.storage.traced import operation

BLOCK_SIZE = 64


@lru_cache
def page_layout(config: TurboQuantConfig, num_kv_heads: int) -> KVCacheLayout:
    """The layout of pages of that many heads."""
    return KVCacheLayout(config, num_kv_heads, BLOCK_SIZE)


def num_blocks(num_tokens: int) -> int:
    """Pages that so many tokens take."""
    return -(-num_tokens // BLOCK_SIZE)


class Pages(ABC):
    """Codes of every token, with what they were made with.

    What depends on data, the transform of keys and the outlier channels, comes from the first tokens that are not read
    in full precision and not known to be padding, for each row and head apart. It is kept from then on: every token is
    read with what it was written with. What `settle` takes of a transform is that of all rows instead.

    Args:
        config: What is stored for one head.
        batch_size: Rows.
        num_kv_heads: Heads of a row.
        tensor: The pages.

    Attributes:
        codec: None as long as there are no codes to read.
        has_kernel: Whether `attend` can read the codes.
    """

    def __init__(self, config: TurboQuantConfig, batch_size: int, num_kv_heads: int, tensor: torch.Tensor) -> None:
        self.config = config
        self.batch_size = batch_size
        self.num_kv_heads = num_kv_heads
        self.tensor = tensor
        # One of its own where that has to stay where it is.
        self._table: torch.Tensor | None = None
        self.codec: LayerCodec | None = None
        self._key_transform = IDENTITY
        # Of the codec beside it.
        self._row_transform: tuple[LayerCodec, KeyTransform] | None = None
        self.has_kernel = config.has_kernels

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.tensor.device

    @property
    def nbytes(self) -> int:
        """Allocated bytes of the pages."""
        return self.tensor.untyped_storage().nbytes()

    def settle(self, key_transform: KeyTransform) -> None:
        """Say what keys of every row go through, those that are stored already included.

        Args:
            key_transform: A transform of tensors [num_kv_heads, ...]; without a mean, the first tokens of a row say it.

        Raises:
            ValueError: If it is for other sizes, or has wrong values.
        """
        key_transform.check(self.num_kv_heads, self.config.head_dim)
        self._key_transform = key_transform

    def write(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        written: Written,
        length: Length,
        row_starts: torch.Tensor | None,
    ) -> None:
        """Quantise and store new tokens.

        Args:
            keys: [batch_size, num_kv_heads, num_new, head_dim].
            values: The same for values, of their head_dim.
            written: Where they go.
            length: The tokens that are stored already.
            row_starts: With the first tokens of all, which of them is the first of every row that is no padding, int32
                [batch_size]; None where no row is padded.
        """
        keys, values = tokens_first(keys), tokens_first(values)
        has_room = written.num_slots <= self.tensor.shape[0] * BLOCK_SIZE
        if self.codec is None or written.may_be_first or not has_room:
            self._prepare(keys, values, length, row_starts)
        if self.codec is None:
            # Kernels skip the slots of first tokens, and still must not find infinite scales there.
            self.tensor.zero_()
        else:
            self._put(keys, values, written.slots)

    def read(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the slots start to stop - 1, [batch_size, num_kv_heads, stop - start, ...].

        Raises:
            RuntimeError: If nothing is stored.
        """
        first = start // BLOCK_SIZE
        if self.codec is None and stop:
            # First tokens and padding alone.
            read = _zeros(self.tensor, stop - first * BLOCK_SIZE, self.config, dtype)
        else:
            call = _traced_read if torch.compiler.is_compiling() else read_pages
            read = call(self.tensor[first:], num_blocks(stop) - first, dtype, self._codec())
        rows, slots = (self.batch_size, self.num_kv_heads), slice(start - first * BLOCK_SIZE, stop - first * BLOCK_SIZE)
        keys, values = (torch.unflatten(x, 0, rows)[:, :, slots] for x in read)
        return keys, values

    def attend(
        self,
        query: torch.Tensor,
        seen: Seen,
        *,
        scale: float | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention of the last stored tokens on the codes, if any are seen; see `attend_pages`."""
        if not seen.has_codes:
            # What takes weight are sinks alone.
            lse = query.new_full(query.shape[:2], -torch.inf, dtype=torch.float32)
            return query.new_zeros(query.shape), lse if sinks is None else sinks.repeat(len(query), 1)
        codec, table, tensor = self._codec(), self._table, self.tensor
        options = (scale, seen.starts, seen.window, softcap, sinks, return_lse)
        if torch.compiler.is_compiling():
            # It traces into what makes a table, and would warn of the cache.
            table = block_table.__wrapped__(len(tensor), self.batch_size, tensor.device) if table is None else table
            output, lse = _traced_attend(query, tensor, table, seen.lengths, *options, codec)
            return output, lse
        if table is None:
            table = block_table(tensor.shape[0], self.batch_size, tensor.device)
        if self._row_transform is None or self._row_transform[0] is not codec:
            self._row_transform = codec, row_transform(codec, self.batch_size)
        return attend_pages(query, tensor, table, seen.lengths, *options, codec, self._row_transform[1])

    def warm_up(self, dtype: torch.dtype) -> None:
        """Write a token to no slot and read one, as a step does: kernels and tables of long calls are others."""
        keys, values = (x.transpose(0, 1) for x in _zeros(self.tensor, 1, self.config, dtype))
        self._put(keys, values, self.tensor.new_full((1,), -1, dtype=torch.int64))
        self.read(0, 1, dtype)

    @abstractmethod
    def reserve(self, num_tokens: int, length: Length) -> None:
        """Make room for so many tokens of a row, of which `length` are stored."""

    @abstractmethod
    def crop(self, length: Length, taken_back: tuple[int, int] | None) -> None:
        """Keep what is left of a row.

        Args:
            length: What is left.
            taken_back: The first position that is not, and one past the last; None for all, whatever there was.
        """

    @abstractmethod
    def drop(self, blocks: int) -> None:
        """Free the first blocks."""

    @abstractmethod
    def select(self, rows: torch.Tensor, num_slots: int) -> "Pages":
        """The rows `rows`, int64 [any], of pages of which so many slots are used."""

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        """The same with `function`, a move, applied to every tensor."""
        mapped = copy(self)
        mapped.tensor = function(self.tensor)
        mapped._table = None if self._table is None else function(self._table)
        mapped.codec = None if self.codec is None else self.codec.map(function)
        mapped._key_transform = self._key_transform.map(function)
        return mapped

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        codec = [] if self.codec is None else self.codec.tensors()
        given = self._key_transform.tensors().values()
        return [self.tensor, *codec, *given, *([] if self._table is None else [self._table])]

    @abstractmethod
    def _prepare(
        self, keys: torch.Tensor, values: torch.Tensor, length: Length, row_starts: torch.Tensor | None
    ) -> None:
        """Make room for new tokens, [num_new, batch_size * num_kv_heads, head_dim], and a codec where one is due."""

    def _put(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        call = _traced_write if torch.compiler.is_compiling() else write_pages
        call(self.tensor, keys, values, slots, self._codec())

    def _calibrated(
        self, keys: torch.Tensor, values: torch.Tensor, num_first: int, row_starts: torch.Tensor | None
    ) -> LayerCodec:
        """The codec of [num_new, batch_size * num_kv_heads, head_dim], of which the first `num_first` do not count."""
        transform = of_equal_rows(self._key_transform, self.batch_size, keys.device)
        if row_starts is None:
            return LayerCodec.calibrate(self.config, keys[num_first:], values[num_first:], None, transform)
        # A row of first tokens and padding alone has to have a mean, too.
        first = (row_starts + num_first).clamp(max=len(keys) - 1).repeat_interleave(self.num_kv_heads)
        counts = torch.arange(len(keys), device=keys.device)[:, None] >= first
        return LayerCodec.calibrate(self.config, keys, values, counts, transform)

    def _rows(self, rows: torch.Tensor, num_blocks: int) -> tuple[torch.Tensor, LayerCodec | None]:
        """The first pages and the codec of some rows."""
        rows = rows.to(self.device)

        def select(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
            by_row = torch.unflatten(x, dim, (self.batch_size, self.num_kv_heads))
            return by_row.index_select(dim, rows).flatten(dim, dim + 1)

        return select(self.tensor[:num_blocks], dim=1), None if self.codec is None else self.codec.map(select)

    def _codec(self) -> LayerCodec:
        if self.codec is None:
            raise RuntimeError("there are no stored states to read")
        return self.codec


def tokens_first(states: torch.Tensor) -> torch.Tensor:
    """[batch_size, num_heads, num_tokens, head_dim] as [num_tokens, batch_size * num_heads, head_dim]."""
    # Inkling's keys come with channels apart, and operations want those of a head side by side.
    states = states if states.stride(-1) == 1 else states.contiguous()
    return states.permute(2, 0, 1, 3).flatten(1, 2)


@lru_cache(maxsize=64)
def block_table(num_blocks: int, num_rows: int, device: torch.device) -> torch.Tensor:
    """Block j of row b is page j * num_rows + b, int32 [num_rows, num_blocks]."""
    blocks, rows = (torch.arange(n, dtype=torch.int32, device=device) for n in (num_blocks, num_rows))
    return blocks * num_rows + rows[:, None]


def row_transform(codec: LayerCodec, batch_size: int) -> KeyTransform:
    """The transform of keys of tensors [batch_size, num_kv_heads, ...]."""
    return codec.key_transform.map(lambda part: part.view(batch_size, -1, *part.shape[1:]))


def write_pages(
    pages: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, codec: LayerCodec
) -> None:
    """Quantise keys and values and store them.

    Args:
        pages: Written in place.
        keys: [num_tokens, batch_size * num_kv_heads, head_dim].
        values: The same for values, of their head_dim.
        slots: int64 [num_tokens]; negative ones are not stored.
        codec: The layer's.
    """
    layout = page_layout(codec.config, pages.shape[1])
    if codec.config.has_kernels:
        cache_update(keys, values, pages, slots, layout, key_transform=codec.key_transform)
        return
    codec.write(layout.views(pages), slots, keys, values)


def read_pages(
    pages: torch.Tensor, count: int, dtype: torch.dtype, codec: LayerCodec
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of the first `count` pages, [batch_size * num_kv_heads, count * 64, ...]."""
    return codec.read(page_layout(codec.config, pages.shape[1]).views(pages), count, dtype)


def attend_pages(
    query: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None,
    starts: torch.Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    return_lse: bool,
    codec: LayerCodec,
    transform: KeyTransform | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the last stored tokens on the codes, which must be of whole bits.

    Args:
        query: [num_tokens, num_heads, head_dim], 1 to 8 tokens of every row, one row after another.
        pages: As everywhere.
        table: What `block_table` gives.
        lengths: int32 [batch_size], the tokens of every row.
        scale: What logits are multiplied with; None is 1 / sqrt(head_dim).
        starts: int32 [batch_size], the first token of every row that may be seen; None for the first stored.
        window: Tokens that a token sees, itself included; None for all.
        softcap: Logits become softcap * tanh(logits / softcap).
        sinks: float32 [num_heads], a logit of each head that takes weight and gives no value.
        return_lse: Whether the log-sum-exp is needed.
        codec: The layer's.
        transform: What `row_transform` gives; None to make it.

    Returns:
        Like the query, and the log-sum-exp of the logits, float32 [num_tokens, num_heads], or [0] where it is not
        needed.
    """
    batch_size = len(lengths)
    layout = page_layout(codec.config, pages.shape[1] // batch_size)
    if transform is None:
        transform = row_transform(codec, batch_size)
    if not (return_lse or softcap or sinks is not None):
        # Softmax does not see the mean.
        transform = transform.without_mean()
    result = decode_attention(
        query,
        pages.view(-1, layout.num_kv_heads, layout.head_bytes),
        table,
        lengths,
        layout,
        scale=scale,
        seq_starts=starts,
        window=window,
        softcap=softcap,
        sinks=sinks,
        key_transform=transform,
        return_lse=return_lse,
    )
    return result if isinstance(result, tuple) else (result, query.new_empty(0, dtype=torch.float32))


def _read_shapes(
    pages: torch.Tensor, count: int, dtype: torch.dtype, codec: LayerCodec
) -> tuple[torch.Tensor, torch.Tensor]:
    return _zeros(pages, count * BLOCK_SIZE, codec.config, dtype)


def _zeros(
    pages: torch.Tensor, num_tokens: int, config: TurboQuantConfig, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of so many tokens, heads first, that are zeros."""
    keys, values = (pages.new_zeros(pages.shape[1], num_tokens, head_dim, dtype=dtype) for head_dim in config.head_dims)
    return keys, values


def _attend_shapes(query: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    *_, return_lse, _ = arguments
    return query.new_empty(query.shape), query.new_empty(query.shape[:2] if return_lse else 0, dtype=torch.float32)


_traced_write = operation(
    "write(Tensor(a!) pages, Tensor keys, Tensor values, Tensor slots, CODEC) -> ()", write_pages, lambda *_: None
)
_traced_read = operation(
    "read(Tensor pages, int count, ScalarType dtype, CODEC) -> (Tensor, Tensor)", read_pages, _read_shapes
)
_traced_attend = operation(
    "attend(Tensor query, Tensor pages, Tensor table, Tensor lengths, float? scale, Tensor? starts, int? window, "
    "float? softcap, Tensor? sinks, bool return_lse, CODEC) -> (Tensor, Tensor)",
    attend_pages,
    _attend_shapes,
)
