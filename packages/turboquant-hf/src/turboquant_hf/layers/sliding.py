"""Sliding-window layers: the codes of one window."""

from typing import Any

import torch

from turboquant_core import TurboQuantConfig
from turboquant_core.ops.decode_attention import MAX_QUERY_LEN
from turboquant_hf.inference_mode import outside_inference_mode
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.storage.page_ops import BLOCK_SIZE
from turboquant_hf.storage.store import PagedStates


class WindowedStates(PagedStates):
    """The last tokens of every row, in whole blocks that are dropped from the front.

    Args:
        config: What is stored for one head.
        batch_size: Rows.
        num_kv_heads: Heads of a row.
        device: Where pages are.
        window: Tokens that a token sees, itself included.
    """

    def __init__(
        self, config: TurboQuantConfig, batch_size: int, num_kv_heads: int, device: torch.device, window: int
    ) -> None:
        super().__init__(config, batch_size, num_kv_heads, device)
        self.window = window
        self.num_dropped = 0

    @property
    def num_seen(self) -> int:
        """Tokens of a row so far, those dropped included."""
        return self.num_dropped + self.num_tokens

    @property
    def read_length(self) -> int:
        """What the tokens appended last see together."""
        return min(self.num_seen - self._num_new, self.window - 1) + self._num_new

    def attend(self, query: torch.Tensor, *, seq_starts: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
        """See `PagedStates.attend`; starts are counted from the first token of all."""
        if seq_starts is not None:
            seq_starts = (seq_starts - self.num_dropped).clamp(min=0)
        return super().attend(query, seq_starts=seq_starts, **{**options, "window": self.window})

    def clear(self) -> None:
        """Forget every token; the next ones are the first."""
        super().clear()
        self.num_dropped = 0

    def trim(self) -> None:
        """Drop the blocks that no later token sees."""
        blocks = max(0, self.num_tokens - (self.window - 1)) // BLOCK_SIZE
        if blocks:
            self.pages = self.pages[blocks:].clone()
            self._num_tokens -= blocks * BLOCK_SIZE
            self.num_dropped += blocks * BLOCK_SIZE


class TurboQuantSlidingLayer(TurboQuantLayer):
    """A layer whose tokens see a window: codes of the window, and at most a block more, are kept.

    Args:
        sliding_window: Tokens that a token sees, itself included.
        preset: As for `TurboQuantLayer`.
        **options: As there.
    """

    states: WindowedStates

    is_sliding = True

    def __init__(
        self,
        sliding_window: int,
        preset: str = "tq4",
        **options: Any,
    ) -> None:
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
            self.states.trim()
        read = super().update(key_states, value_states, *args, **kwargs)
        # Placeholders are read after this; anything else has been read.
        if not self.record_past and key_states.shape[-2] > MAX_QUERY_LEN:
            self.states.trim()
        return read

    @outside_inference_mode
    def store_again(self, key_states: torch.Tensor, value_states: torch.Tensor, row_starts: torch.Tensor) -> None:
        """See `TurboQuantLayer.store_again`."""
        super().store_again(key_states, value_states, row_starts)
        if not self.record_past:
            self.states.trim()

    def get_seq_length(self) -> int:
        """Tokens seen, of which those in the window are stored."""
        return self.states.num_seen if self.is_initialized else 0

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
            states = self.states
            remaining = max(0, states.num_seen + tokens_to_remove)
            if states.num_dropped and remaining - states.num_dropped < min(remaining, self.sliding_window - 1):
                raise RuntimeError(
                    f"crop({tokens_to_remove}) leaves {remaining} tokens, of which the first {states.num_dropped} have "
                    f"left the window of {self.sliding_window} and are gone. Call activate_past_recording() before "
                    "tokens that may be taken back, or start with a new cache."
                )
        super().crop(tokens_to_remove)
        if self.is_initialized and self.record_past:
            self.states.trim()

    def _new_states(self, batch_size: int, num_kv_heads: int) -> PagedStates:
        return WindowedStates(self.config, batch_size, num_kv_heads, self.device, self.sliding_window)
