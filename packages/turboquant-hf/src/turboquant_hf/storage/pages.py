"""The codes of a layer, in pages that core's kernels read."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from copy import copy
from typing import Any, Self

import torch

from turboquant_core import TurboQuantConfig
from turboquant_hf.storage import page_ops, traced
from turboquant_hf.storage.codec import LayerCodec, has_whole_bits
from turboquant_hf.storage.length import Length
from turboquant_hf.storage.page_ops import BLOCK_SIZE, num_blocks
from turboquant_hf.storage.tables import Seen, block_table


class Pages(ABC):
    """Codes of every token, with what they were made with.

    What depends on data, the transform of keys and the outlier channels, comes from the first tokens that are not read
    in full precision and not known to be padding, for each row and head apart. It is kept from then on: every token is
    read with what it was written with.

    Args:
        config: What is stored for one head.
        batch_size: Rows.
        num_kv_heads: Heads of a row.
        tensor: The pages; see `page_ops`.

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
        self.has_kernel = has_whole_bits(config)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self.tensor.device

    @property
    def nbytes(self) -> int:
        """Allocated bytes of the pages."""
        return self.tensor.untyped_storage().nbytes()

    def write(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        slots: torch.Tensor,
        length: Length,
        row_starts: torch.Tensor | None,
    ) -> None:
        """Quantise and store new tokens.

        Args:
            keys: [batch_size, num_kv_heads, num_new, head_dim].
            values: The same for values.
            slots: int64 [num_new]; negative ones are not stored.
            length: The tokens that are stored already.
            row_starts: With the first tokens of all, which of them is the first of every row that is no padding, int32
                [batch_size]; None where no row is padded.
        """
        keys, values = tokens_first(keys), tokens_first(values)
        self._prepare(keys, values, length, row_starts)
        if self.codec is None:
            # Kernels skip the slots of first tokens, and still must not find infinite scales there.
            self.tensor.zero_()
        else:
            self._put(keys, values, slots)

    def read(self, start: int, stop: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the slots start to stop - 1, [batch_size, num_kv_heads, stop - start, head_dim].

        Raises:
            RuntimeError: If nothing is stored.
        """
        first = start // BLOCK_SIZE
        if self.codec is None and stop:
            # First tokens and padding alone.
            shape = (2, self.tensor.shape[1], stop - first * BLOCK_SIZE, self.config.head_dim)
            read = self.tensor.new_zeros(shape, dtype=dtype).unbind()
        else:
            call = traced.read if torch.compiler.is_compiling() else page_ops.read
            read = call(self.tensor[first:], num_blocks(stop) - first, self._codec(), dtype)
        shape = (self.batch_size, self.num_kv_heads, -1, self.config.head_dim)
        keys, values = (x.view(shape)[:, :, start - first * BLOCK_SIZE : stop - first * BLOCK_SIZE] for x in read)
        return keys, values

    def attend(self, query: torch.Tensor, seen: Seen, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Causal attention of the last stored tokens on the codes; see `page_ops.attend`."""
        call = traced.attend if torch.compiler.is_compiling() else page_ops.attend
        options |= {"seq_starts": seen.starts, "window": seen.window}
        table = block_table(len(self.tensor), self.batch_size, self.device) if self._table is None else self._table
        return call(query, self.tensor, table, seen.lengths, self._codec(), **options)

    @abstractmethod
    def reserve(self, num_tokens: int, length: Length) -> None:
        """Make room for so many tokens of a row, of which `length` are stored."""

    @abstractmethod
    def crop(self, length: Length) -> None:
        """Keep what is left of a row."""

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
        mapped.codec = None if self.codec is None else self.codec.map(function)
        return mapped

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        codec, table = [] if self.codec is None else self.codec.tensors(), [] if self._table is None else [self._table]
        return [self.tensor, *codec, *table]

    @abstractmethod
    def _prepare(
        self, keys: torch.Tensor, values: torch.Tensor, length: Length, row_starts: torch.Tensor | None
    ) -> None:
        """Make room for new tokens, [num_new, batch_size * num_kv_heads, head_dim], and a codec where one is due."""

    def _put(self, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
        call = traced.write if torch.compiler.is_compiling() else page_ops.write
        call(self.tensor, keys, values, slots, self._codec())

    def _calibrated(
        self, keys: torch.Tensor, values: torch.Tensor, num_first: int, row_starts: torch.Tensor | None
    ) -> LayerCodec:
        """The codec of [num_new, batch_size * num_kv_heads, head_dim], of which the first `num_first` do not count."""
        if row_starts is None:
            return LayerCodec.calibrate(self.config, keys[num_first:], values[num_first:])
        # A row of first tokens and padding alone has to have a mean, too.
        first = (row_starts + num_first).clamp(max=len(keys) - 1).repeat_interleave(self.num_kv_heads)
        counts = torch.arange(len(keys), device=keys.device)[:, None] >= first
        return LayerCodec.calibrate(self.config, keys, values, counts)

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
    states = states.detach() if states.stride(-1) == 1 else states.detach().contiguous()
    return states.permute(2, 0, 1, 3).flatten(1, 2)
