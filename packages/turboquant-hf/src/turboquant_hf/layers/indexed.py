"""Layers of sparse attention, as DeepSeek-V3.2 and GLM-5 have: codes, beside the keys of an indexer."""

from typing import Any

import torch

from turboquant_hf.inference_mode import outside_inference_mode
from turboquant_hf.layers.growing import TurboQuantLayer
from turboquant_hf.layers.rows import picked, reordered, repeated


class TurboQuantIndexedLayer(TurboQuantLayer):
    """Full attention, compressed as in `TurboQuantLayer`, and what chooses the tokens that a token sees.

    The indexer's keys are kept as they are: they are few, and an error in them would change the choice. A new layer
    takes what `TurboQuantLayer` does.

    Attributes:
        indexer_keys: [batch_size, num_tokens, index_head_dim]; None before the first.
        indexer_position_ids: int64 [position_dims, batch_size, num_tokens], which some models keep here; else None.
    """

    indexer_keys: torch.Tensor | None = None
    indexer_position_ids: torch.Tensor | None = None

    @outside_inference_mode
    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Keep new keys of the indexer, [batch_size, num_new, index_head_dim], and give all."""
        held = self.indexer_keys
        self.indexer_keys = indexer_key_states if held is None else torch.cat([held, indexer_key_states], dim=1)
        return self.indexer_keys

    def reset(self) -> None:
        """Forget every token, and free its memory."""
        super().reset()
        self.indexer_keys = self.indexer_position_ids = None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: If the argument is positive.
        """
        super().crop(tokens_to_remove)
        num_tokens = self.store.length.num_seen if self.is_initialized else 0
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys[:, :num_tokens]
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids[..., :num_tokens]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the sequences `beam_idx`, int64 [batch_size]."""
        super().reorder_cache(beam_idx)
        self._select(reordered(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self.reorder_cache(repeated(self.store.batch_size, repeats))

    def batch_select_indices(self, indices: Any) -> None:
        """Keep the sequences that `indices` picks of a tensor's first dimension: numbers, or a bool for each."""
        self.reorder_cache(picked(self.store.batch_size, indices))

    def offload(self) -> None:
        """Move everything kept to the CPU."""
        super().offload()
        self._move("cpu")

    def prefetch(self) -> None:
        """Move everything kept back to the layer's device."""
        super().prefetch()
        if self.is_initialized:
            self._move(self.device)

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the layer keeps."""
        kept = (self.indexer_keys, self.indexer_position_ids)
        return [*super().tensors(), *(tensor for tensor in kept if tensor is not None)]

    @outside_inference_mode
    def _select(self, rows: torch.Tensor) -> None:
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys.index_select(0, rows.to(self.indexer_keys.device))
        if self.indexer_position_ids is not None:
            self.indexer_position_ids = self.indexer_position_ids.index_select(
                1, rows.to(self.indexer_position_ids.device)
            )

    def _move(self, device: torch.device | str) -> None:
        if self.indexer_keys is not None:
            self.indexer_keys = self.indexer_keys.to(device, non_blocking=True)
