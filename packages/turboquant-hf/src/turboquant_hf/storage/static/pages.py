"""Pages that are made once."""

from typing import Self

import torch

from turboquant_core import TurboQuantConfig
from turboquant_hf.storage.codec import LayerCodec
from turboquant_hf.storage.length import Length
from turboquant_hf.storage.pages import BLOCK_SIZE, Pages, block_table, num_blocks, page_layout
from turboquant_hf.storage.static.addresses import copy_into, keep_addresses


class StaticPages(Pages):
    """Pages for at most `max_length` tokens of a row, which keep their addresses."""

    def __init__(
        self, config: TurboQuantConfig, batch_size: int, num_kv_heads: int, max_length: int, device: torch.device
    ) -> None:
        # Zeroed: unwritten slots are read, and masked.
        tensor = page_layout(config, batch_size * num_kv_heads).allocate(num_blocks(max_length), device)
        super().__init__(config, batch_size, num_kv_heads, tensor)
        self._table = block_table(len(tensor), batch_size, device).clone()
        keep_addresses(tensor, self._table)

    def reserve(self, num_tokens: int, length: Length) -> None:
        """Nothing: there is all the room that there will be."""

    def crop(self, length: Length, taken_back: tuple[int, int] | None) -> None:
        """Put zeros where tokens were: that is read, and masked, and a weight of zero hides no infinity."""
        if taken_back is None:
            # Whoever forgets all does not wait for the device, and may be traced.
            self.tensor.zero_()
            return
        start, stop = taken_back
        first, last = start // BLOCK_SIZE, num_blocks(stop)
        views = page_layout(self.config, self.tensor.shape[1]).views(self.tensor)
        # Codes are numbers, whatever they stand for.
        for scales in (views.key_scales, views.value_scales):
            scales[first : first + 1, :, start % BLOCK_SIZE :] = 0.0
            scales[first + 1 : last] = 0.0

    def drop(self, blocks: int) -> None:
        """Nothing: masks hide what has left a window."""

    def select(self, rows: torch.Tensor, num_slots: int) -> Self:
        """The same, with its rows in another order."""
        if len(rows) != self.batch_size:
            raise ValueError(
                f"{len(rows)} rows of a static cache of {self.batch_size} were picked; it keeps its batch size. Use a "
                "cache without max_length."
            )
        tensor, codec = self._rows(rows, len(self.tensor))
        self.tensor.copy_(tensor)
        if codec is not None:
            self._keep_codec(codec)
        return self

    def _prepare(
        self, keys: torch.Tensor, values: torch.Tensor, length: Length, row_starts: torch.Tensor | None
    ) -> None:
        if length.is_empty:
            # First tokens are far from all others; a prompt of nothing else has to do.
            num_first = length.sizes.first if len(keys) > length.sizes.first else 0
            self._keep_codec(self._calibrated(keys, values, num_first, row_starts))

    def _keep_codec(self, codec: LayerCodec) -> None:
        if self.codec is None:
            self.codec = codec.map(torch.clone)
            keep_addresses(*self.codec.tensors())
        else:
            copy_into(self.codec.tensors(), codec.tensors())
