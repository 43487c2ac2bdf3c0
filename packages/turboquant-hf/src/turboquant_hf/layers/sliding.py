"""Sliding-window layers: what one window sees."""

from typing import Any

import torch

from turboquant_hf.attention.handover import is_still_to_be_read
from turboquant_hf.inference_mode import outside_inference_mode
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.storage.growing.store import growing_store
from turboquant_hf.storage.store import Store
from turboquant_hf.storage.tables import MAX_STEP_TOKENS, FullPrecisionSizes


class TurboQuantSlidingLayer(TurboQuantLayer):
    """A layer whose tokens see a window: codes of the window are kept, and at most a block more.

    What a call of more than 8 tokens brought stays until the next one, where attention reads it after `update`. Sinks
    and recent tokens are read as they are as long as the window shows them.

    Args:
        sliding_window: Tokens that a token sees, itself included.
        preset: As for `TurboQuantLayer`.
        **options: As there.
    """

    is_sliding = True

    def __init__(self, sliding_window: int, preset: str, **options: Any) -> None:
        super().__init__(preset, **options)
        self.sliding_window = sliding_window
        self.record_past = False

    def activate_past_recording(self) -> None:
        """Keep what leaves the window until the next `crop`, so that it can be undone."""
        self.record_past = True

    @outside_inference_mode
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new states and return what attention reads of the window and of them."""
        if self.is_initialized and not self.record_past:
            self.store.trim()
        read = super().update(key_states, value_states, *args, **kwargs)
        if not self.record_past and key_states.shape[-2] > MAX_STEP_TOKENS and not is_still_to_be_read(read[0]):
            self.store.trim()
        return read

    @outside_inference_mode
    def store_again(self, key_states: torch.Tensor, value_states: torch.Tensor, row_starts: torch.Tensor) -> None:
        """See `TurboQuantLayer.store_again`."""
        super().store_again(key_states, value_states, row_starts)
        if not self.record_past:
            self.store.trim()

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a call with `query_length` new tokens attends to."""
        kept = min(self.get_seq_length(), self.sliding_window - 1)
        return kept + query_length, self.get_seq_length() - kept

    @outside_inference_mode
    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens, and what has left the window.

        Raises:
            ValueError: If the argument is positive.
            RuntimeError: If tokens that would be in the window again are gone.
        """
        if self.is_initialized:
            length = self.store.length
            remaining = max(0, length.num_seen + tokens_to_remove)
            if length.num_dropped and remaining - length.num_dropped < min(remaining, self.sliding_window - 1):
                raise RuntimeError(
                    f"crop({tokens_to_remove}) leaves {remaining} tokens, of which the first {length.num_dropped} have "
                    f"left the window of {self.sliding_window} and are gone. Call activate_past_recording() before "
                    "tokens that may be taken back, or start with a new cache."
                )
        super().crop(tokens_to_remove)
        if self.is_initialized and self.record_past:
            self.store.trim()

    @property
    def _sizes(self) -> FullPrecisionSizes:
        return super()._sizes.within(self.sliding_window)

    def _new_store(self, batch_size: int, num_kv_heads: int) -> Store:
        heads = (batch_size, num_kv_heads)
        return growing_store(self.config, *heads, self.dtype, self.device, self._sizes, window=self.sliding_window)
