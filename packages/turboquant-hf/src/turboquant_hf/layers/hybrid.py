"""Layers with attention and linear attention in one, as Falcon-H1 and Zamba2 have: codes, beside a state."""

from typing import Any

import torch

from turboquant_hf._compat import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.layers.rows import picked, repeated
from turboquant_hf.layers.sliding import TurboQuantSlidingLayer


class _BesideState(LinearAttentionLayer):
    """Does to the state of linear attention, which is kept as it is, what is done to the codes."""

    _attention: type[TurboQuantLayer]

    is_compileable = False

    def __init__(self, *args: Any, number_of_states: int = 1, **options: Any) -> None:
        self._attention.__init__(self, *args, **options)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back, which a recurrent state does not allow."""
        return not any(self.is_recurrent_states_initialized.values())

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Take shape, type and device from key and value states, or from a state given by keyword."""
        if args:
            self._attention.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget every token."""
        self._attention.reset(self)
        LinearAttentionLayer.reset(self)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens.

        Raises:
            RuntimeError: If nothing recorded the states that are to be again.
        """
        LinearAttentionLayer.crop(self, tokens_to_remove)
        self._attention.crop(self, tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the sequences `beam_idx`, int64 [batch_size]."""
        self._attention.reorder_cache(self, beam_idx)
        LinearAttentionLayer.reorder_cache(self, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self.reorder_cache(repeated(self.store.batch_size, repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the sequences that `indices` picks of a tensor's first dimension: numbers, or a bool for each."""
        self.reorder_cache(picked(self.store.batch_size, indices))

    def offload(self) -> None:
        """Move everything kept to the CPU."""
        self._attention.offload(self)
        LinearAttentionLayer.offload(self)

    def prefetch(self) -> None:
        """Move everything kept back to the layer's device."""
        self._attention.prefetch(self)
        LinearAttentionLayer.prefetch(self)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the layer keeps."""
        states = (*self.conv_states.values(), *self.recurrent_states.values())
        return [*self._attention.tensors(self), *(state for state in states if state is not None)]


class TurboQuantHybridLayer(_BesideState, TurboQuantLayer, LinearAttentionAndFullAttentionLayer):
    """Full attention, compressed as in `TurboQuantLayer`, and linear attention.

    Args:
        preset: As for `TurboQuantLayer`.
        number_of_states: States of linear attention.
        **options: As for `TurboQuantLayer`.
    """

    _attention = TurboQuantLayer
    is_croppable = _BesideState.is_croppable


class TurboQuantHybridSlidingLayer(_BesideState, TurboQuantSlidingLayer):
    """Attention within a window, compressed as in `TurboQuantSlidingLayer`, and linear attention.

    Args:
        sliding_window: As for `TurboQuantSlidingLayer`.
        preset: As there.
        number_of_states: States of linear attention.
        **options: As for `TurboQuantSlidingLayer`.
    """

    _attention = TurboQuantSlidingLayer
    is_croppable = _BesideState.is_croppable
