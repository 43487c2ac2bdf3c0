"""Pages for any number of tokens."""

from copy import copy
from typing import Self

import torch

from turboquant_core import TurboQuantConfig
from turboquant_hf.storage.codec import LayerCodec
from turboquant_hf.storage.length import Length
from turboquant_hf.storage.pages import BLOCK_SIZE, Pages, num_blocks, page_layout, tokens_first

# Storage that is full grows by a thirty-second, and a block: a token is copied some thirty times in all, where every
# step of decoding reads all of them, and little is unused.
GROWTH_DIVISOR = 32


class GrowingPages(Pages):
    """Pages for any number of tokens, and a few more of which they grow."""

    @classmethod
    def empty(cls, config: TurboQuantConfig, batch_size: int, num_kv_heads: int, device: torch.device) -> Self:
        """Pages without a token."""
        tensor = page_layout(config, batch_size * num_kv_heads).allocate(0, device)
        return cls(config, batch_size, num_kv_heads, tensor)

    @classmethod
    def restored(
        cls, config: TurboQuantConfig, batch_size: int, fields: dict[str, torch.Tensor], codec: LayerCodec | None
    ) -> Self:
        """Pages of the tokens that `fields` gave, with zeros where there is none."""
        num_heads, num_tokens, _ = fields["key_codes"].shape
        layout, blocks = page_layout(config, num_heads), num_blocks(num_tokens)
        tensor = layout.allocate(blocks, fields["key_codes"].device)
        views = layout.views(tensor)
        for name, field in fields.items():
            whole = torch.nn.functional.pad(field, (0, 0, 0, blocks * BLOCK_SIZE - num_tokens))
            getattr(views, name).copy_(whole.view(num_heads, blocks, BLOCK_SIZE, -1).transpose(0, 1))
        pages = cls(config, batch_size, num_heads // batch_size, tensor)
        pages.codec = codec
        return pages

    def fields(self, num_tokens: int) -> dict[str, torch.Tensor]:
        """What is stored of the first tokens, by the fields of core's `PageViews`: [heads, num_tokens, n]."""
        pages = self.tensor[: num_blocks(num_tokens)]
        views = page_layout(self.config, pages.shape[1]).views(pages)
        return {name: field.transpose(0, 1).flatten(1, 2)[:, :num_tokens] for name, field in vars(views).items()}

    def reserve(self, num_tokens: int, length: Length) -> None:
        """See `Pages`."""
        if num_tokens <= len(self.tensor) * BLOCK_SIZE:
            return
        needed = num_blocks(num_tokens)
        # Nobody knows whether a prompt is followed by anything; what has grown once will grow again.
        held = needed if length.is_empty else _grown(needed)
        grown = self.tensor.new_empty(held, *self.tensor.shape[1:])
        used = num_blocks(length.num_slots())
        grown[:used] = self.tensor[:used]
        self.tensor = grown

    def crop(self, length: Length, taken_back: tuple[int, int] | None) -> None:
        """Keep what is left of a row; what that leaves unused beyond twice a growth is freed."""
        if length.num_seen <= length.num_uncoded:
            self.codec = None
        used = num_blocks(length.num_slots())
        # Drafts that are verified around the end of a block must not make it shrink and grow each time.
        if len(self.tensor) > _grown(_grown(used)):
            self.tensor = self.tensor[:used].clone()

    def drop(self, blocks: int) -> None:
        """See `Pages`."""
        if blocks:
            self.tensor = self.tensor[blocks:].clone()

    def select(self, rows: torch.Tensor, num_slots: int) -> Self:
        """See `Pages`."""
        selected = copy(self)
        selected.batch_size = len(rows)
        selected.tensor, selected.codec = self._rows(rows, num_blocks(num_slots))
        return selected

    def _prepare(
        self, keys: torch.Tensor, values: torch.Tensor, length: Length, row_starts: torch.Tensor | None
    ) -> None:
        start, stop, num_first = length.num_seen, length.num_seen + len(keys), length.sizes.first
        self.reserve(length.num_slots(len(keys)), length)
        # First tokens may come in several calls, and where rows start with the first.
        row_starts = row_starts if length.row_starts is None else length.row_starts
        if start <= num_first < stop:
            # First tokens are far from all others, and take no part in the mean. Those of padded rows have codes.
            num_slots = length.num_slots()
            before = self._by_token(num_slots, keys.dtype) if self.codec is not None and num_slots else None
            self.codec = self._calibrated(keys, values, num_first - start, row_starts)
            if before is not None:
                self._put(*before, torch.arange(num_slots, device=self.device))
        elif self.codec is None and length.num_uncoded < stop:
            self.codec = self._calibrated(keys, values, 0, row_starts)

    def _by_token(self, num_slots: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [num_slots, batch_size * num_kv_heads, head_dim] of the first slots."""
        keys, values = (tokens_first(x) for x in self.read(0, num_slots, dtype))
        return keys, values


def _grown(needed: int) -> int:
    """Blocks to hold where so many are needed."""
    return needed + -(-needed // GROWTH_DIVISOR)
