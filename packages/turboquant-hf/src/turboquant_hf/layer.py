"""One attention layer's compressed cache."""

from collections.abc import Callable
from typing import Any

import torch

from turboquant_core import TurboQuantConfig
from turboquant_hf._compat import CacheLayerMixin
from turboquant_hf.states import QuantizedStates


class TurboQuantLayer(CacheLayerMixin):
    """Keys and values of one full-attention layer, stored as TurboQuant codes.

    The first tokens attend on their raw keys and values, as prefill does. Every later token attends on what the codes
    say, its own included: its output does not depend on how tokens were grouped into calls, so verifying several
    drafted tokens at once gives what decoding them one by one gives.

    No full-precision copy outlives a call. `keys` and `values` of the base class stay None.

    Args:
        preset: Preset of `TurboQuantConfig`; the layer learns its head_dim from the first keys it sees.
        **overrides: Fields of `TurboQuantConfig` that replace the preset's.
    """

    config: TurboQuantConfig

    is_sliding = False
    is_croppable = True

    def __init__(self, preset: str = "tq4", **overrides: Any) -> None:
        super().__init__()
        self._preset = preset
        self._overrides = overrides

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take shape, type and device from key and value states [batch_size, num_kv_heads, num_tokens, head_dim]."""
        if key_states.shape[-1] != value_states.shape[-1]:
            raise ValueError(
                f"keys have {key_states.shape[-1]} channels and values {value_states.shape[-1]}; attention with "
                "different sizes (such as MLA) is not supported. Use DynamicCache for this model."
            )
        self.config = TurboQuantConfig.preset(self._preset, key_states.shape[-1], **self._overrides)
        self.batch_size, self.num_kv_heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.quantized_keys = QuantizedStates(
            self.config.key_bits, self.config.key_scale, center=self.config.center_keys
        )
        self.quantized_values = QuantizedStates(self.config.value_bits, self.config.value_scale, center=False)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new states and return what attention reads, [batch_size, num_kv_heads, num_tokens, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check(key_states, value_states)
        is_prefill = self.get_seq_length() == 0
        self.quantized_keys.append(key_states)
        self.quantized_values.append(value_states)
        if is_prefill:
            return key_states, value_states
        return (
            self.quantized_keys.dequantize(self.dtype),
            self.quantized_values.dequantize(self.dtype),
        )

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.quantized_keys.num_tokens if self.is_initialized else 0

    def get_max_length(self) -> int:
        """-1: the layer grows without bound."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that a call with `query_length` new tokens attends to."""
        return self.get_seq_length() + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: If the argument is positive.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop got {tokens_to_remove}; pass the number of tokens to remove as a negative number")
        if tokens_to_remove and self.is_initialized:
            remaining = max(0, self.get_seq_length() + tokens_to_remove)
            self.quantized_keys.crop(remaining)
            self.quantized_values.crop(remaining)

    def reset(self) -> None:
        """Forget every token, and free its memory."""
        if self.is_initialized:
            self.quantized_keys.clear()
            self.quantized_values.clear()
            self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the sequences `beam_idx`, int64 [batch_size]."""
        self._map_batch(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._map_batch(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices`."""
        self._map_batch(lambda t: t[indices, ...])

    def offload(self) -> None:
        """Move everything kept to the CPU."""
        self._map_batch(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything kept back to the layer's device."""
        if self.is_initialized:
            self._map_batch(lambda t: t.to(self.device, non_blocking=True))

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that the layer keeps."""
        if not self.is_initialized:
            return []
        return self.quantized_keys.tensors() + self.quantized_values.tensors()

    def _map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.is_initialized:
            self.quantized_keys.map_batch(function)
            self.quantized_values.map_batch(function)
            kept = self.tensors()
            self.batch_size = kept[0].shape[0] if kept else self.batch_size

    def _check(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        expected = (self.batch_size, self.num_kv_heads, key_states.shape[-2], self.config.head_dim)
        for name, states in (("key_states", key_states), ("value_states", value_states)):
            if tuple(states.shape) != expected:
                raise ValueError(
                    f"{name} are {list(states.shape)}; this cache holds [batch_size, num_kv_heads, num_tokens, "
                    f"head_dim] = {list(expected)}. Use a new cache, or reset() this one, for another batch."
                )
            if (states.dtype, states.device) != (self.dtype, self.device):
                raise ValueError(
                    f"{name} are {states.dtype} on {states.device}; this cache was filled with {self.dtype} on "
                    f"{self.device}. Use a new cache, or reset() this one, for another type or device."
                )
