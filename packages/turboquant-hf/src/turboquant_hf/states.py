"""The stored keys and values of one layer."""

from copy import copy

import torch

from turboquant_core import TurboQuantConfig
from turboquant_core.quantized import storage_nbytes
from turboquant_hf import ops
from turboquant_hf.codec import LayerCodec
from turboquant_hf.paged import num_blocks, page_layout
from turboquant_hf.tables import block_table, row_lengths, slot_range

# Storage that is full grows by a thirty-second, and a block: a token is copied some thirty times in all, where every
# step of decoding reads all of them, and little is unused.
GROWTH_DIVISOR = 32


class PagedStates:
    """Keys and values [batch_size, num_kv_heads, num_tokens, head_dim] of one layer, kept as codes and scales only.

    They are in pages that core's kernels attend on; see `paged`. Growing, cropping and picking rows are operations on
    whole pages or on their second dimension.

    What depends on data, the key mean and the outlier channels, comes from the first tokens appended, for each row and
    head apart, and is kept from then on: every stored token is read with what it was written with.

    Args:
        config: What is stored for one head.
        batch_size: Rows.
        num_kv_heads: Heads of a row.
        device: Where pages are.
    """

    def __init__(self, config: TurboQuantConfig, batch_size: int, num_kv_heads: int, device: torch.device) -> None:
        self.config = config
        self.batch_size = batch_size
        self.num_kv_heads = num_kv_heads
        self.pages = page_layout(config, batch_size * num_kv_heads).allocate(0, device)
        self.codec: LayerCodec | None = None
        self._num_tokens = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of a row."""
        return self._num_tokens

    @property
    def stored_length(self) -> int:
        """Slots of a row that hold tokens, or may."""
        return self._num_tokens

    @property
    def read_length(self) -> int:
        """How many of them, the last ones, attention reads."""
        return self.stored_length

    @property
    def is_empty(self) -> bool:
        """Whether the next tokens are the first."""
        return self._num_tokens == 0

    @property
    def has_kernel(self) -> bool:
        """Whether `attend` can read the codes."""
        return self._codec().has_whole_bits

    @property
    def used_nbytes(self) -> int:
        """Bytes of the codes and scales of stored tokens."""
        return self.num_tokens * self.batch_size * self.num_kv_heads * self.config.slot_bytes

    @property
    def nbytes(self) -> int:
        """Allocated bytes of everything kept."""
        return storage_nbytes(self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        return [self.pages, *(self.codec.tensors() if self.codec is not None else [])]

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Quantise and store keys and values [batch_size, num_kv_heads, num_new, head_dim]."""
        num_new = keys.shape[-2]
        if num_new == 0:
            return
        keys, values = tokens_first(keys), tokens_first(values)
        if self.codec is None:
            self.codec = LayerCodec.calibrate(self.config, keys, values)
        stop = self._num_tokens + num_new
        self._reserve(stop)
        slots = slot_range(self._num_tokens, stop, self.pages.device)
        ops.write(self.pages, keys, values, slots, self.codec)
        self._num_tokens = stop

    def dequantize(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that attention reads, [batch_size, num_kv_heads, read_length, head_dim].

        Raises:
            RuntimeError: If nothing is stored.
        """
        keys, values = ops.read(self.pages, num_blocks(self.stored_length), self._codec(), dtype)
        shape = (self.batch_size, self.num_kv_heads, -1, self.config.head_dim)
        tokens = slice(self.stored_length - self.read_length, self.stored_length)
        return keys.view(shape)[:, :, tokens], values.view(shape)[:, :, tokens]

    def attend(
        self,
        query: torch.Tensor,
        *,
        scale: float | None,
        seq_starts: torch.Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of the last stored tokens on the codes; see `paged.attend`."""
        return ops.attend(
            query,
            self.pages,
            self._block_table(),
            self._row_lengths(),
            self._codec(),
            scale=scale,
            seq_starts=seq_starts,
            window=window,
            softcap=softcap,
            sinks=None if sinks is None else sinks.detach().float(),
        )

    def crop(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens; what that leaves unused beyond twice a growth is freed."""
        if num_tokens >= self._num_tokens:
            return
        self._num_tokens = num_tokens
        if num_tokens == 0:
            self.codec = None
        used = num_blocks(num_tokens)
        # Drafts that are verified around the end of a block must not make it shrink and grow each time.
        if len(self.pages) > _grown(_grown(used)):
            self.pages = self.pages[:used].clone()

    def select_rows(self, rows: torch.Tensor) -> "PagedStates":
        """The rows `rows`, int64 [any], as states of their own."""
        rows = rows.to(self.pages.device)

        def select(x: torch.Tensor, dim: int = 0) -> torch.Tensor:
            by_row = torch.unflatten(x, dim, (self.batch_size, self.num_kv_heads))
            return by_row.index_select(dim, rows).flatten(dim, dim + 1)

        selected = copy(self)
        selected.batch_size = len(rows)
        selected.pages = select(self.pages[: num_blocks(self.stored_length)], dim=1)
        selected.codec = None if self.codec is None else self.codec.map(select)
        return selected

    @classmethod
    def restore(cls, pages: torch.Tensor, codec: LayerCodec, batch_size: int, num_tokens: int) -> "PagedStates":
        """States whose tokens are in these pages."""
        states = cls(codec.config, batch_size, pages.shape[1] // batch_size, pages.device)
        states.pages, states.codec, states._num_tokens = pages, codec, num_tokens
        return states

    def to(self, device: torch.device | str) -> "PagedStates":
        """The same states on another device, without waiting; these stay as they are for whoever reads them."""

        def move(x: torch.Tensor) -> torch.Tensor:
            return x.to(device, non_blocking=True)

        moved = copy(self)
        moved.pages = move(self.pages)
        moved.codec = None if self.codec is None else self.codec.map(move)
        return moved

    def _block_table(self) -> torch.Tensor:
        return block_table(len(self.pages), self.batch_size, self.pages.device)

    def _row_lengths(self) -> torch.Tensor:
        return row_lengths(self._num_tokens, self.batch_size, self.pages.device)

    def _codec(self) -> LayerCodec:
        if self.codec is None:
            raise RuntimeError("there are no stored states to read")
        return self.codec

    def _reserve(self, num_tokens: int) -> None:
        needed = num_blocks(num_tokens)
        if needed <= len(self.pages):
            return
        # Nobody knows whether a prompt is followed by anything; what has grown once will grow again.
        held = needed if self.is_empty else _grown(needed)
        grown = self.pages.new_empty(held, *self.pages.shape[1:])
        used = num_blocks(self._num_tokens)
        grown[:used] = self.pages[:used]
        self.pages = grown


def tokens_first(states: torch.Tensor) -> torch.Tensor:
    """[batch_size, num_heads, num_tokens, head_dim] as [num_tokens, batch_size * num_heads, head_dim]."""
    return states.detach().permute(2, 0, 1, 3).flatten(1, 2)


def _grown(needed: int) -> int:
    """Blocks to hold where so many are needed."""
    return needed + -(-needed // GROWTH_DIVISOR)
