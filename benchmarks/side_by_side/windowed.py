"""A trial: TurboQuant codes behind the full-precision window that QuantizedCache has; no option of the package yet."""

import torch
from transformers import Cache, PreTrainedConfig

from turboquant_hf import TurboQuantLayer


class WindowedLayer(TurboQuantLayer):
    """Keeps new tokens as they are until there are `window` of them, then quantises these, once.

    Args:
        window: Tokens at which the window is emptied.
        sinks: First tokens that stay as they are.
        bits: Bits of keys and values.
    """

    def __init__(self, window: int, sinks: int, bits: int) -> None:
        super().__init__(key_bits=bits, value_bits=bits)
        self._window = window
        self._num_sinks = sinks

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new states and return the first tokens, the dequantised history and the window."""
        new = (key_states, value_states)
        if not self.is_initialized:
            self._sinks = [states[:, :, : self._num_sinks].clone() for states in new]
            self._recent = [states[:, :, :0].clone() for states in new]
            super().update(key_states[:, :, self._num_sinks :], value_states[:, :, self._num_sinks :])
            return key_states, value_states
        stored = self.states.dequantize(self.dtype)
        recent = [torch.cat(pair, dim=-2) for pair in zip(self._recent, new, strict=True)]
        keys, values = (torch.cat(parts, dim=-2) for parts in zip(self._sinks, stored, recent, strict=True))
        if recent[0].shape[-2] >= self._window:
            self.states.append(recent[0], recent[1])
            recent = [states[:, :, :0].clone() for states in recent]
        self._recent = recent
        return keys, values

    def get_seq_length(self) -> int:
        """All tokens held."""
        if not self.is_initialized:
            return 0
        return self._num_sinks + super().get_seq_length() + self._recent[0].shape[-2]


def windowed_cache(config: PreTrainedConfig, window: int, sinks: int, bits: int) -> Cache:
    """A cache of windowed layers, for a model that has full-attention layers only."""
    num_layers = config.get_text_config(decoder=True).num_hidden_layers
    return Cache(layers=[WindowedLayer(window, sinks, bits) for _ in range(num_layers)])
