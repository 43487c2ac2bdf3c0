"""The stored keys, or the stored values, of one layer."""

from collections.abc import Callable

import torch

from turboquant_core import MSEQuantizer, OutlierQuantizer, QuantizedTensor
from turboquant_core.quantized import storage_nbytes
from turboquant_core.scale import ScaleRule
from turboquant_core.vector_format import OUTLIER_BITS

TOKEN_DIM = -2


class QuantizedStates:
    """Key or value states [batch_size, num_kv_heads, num_tokens, head_dim], kept as codes and scales only.

    What depends on data, the mean and the outlier channels, comes from the first tokens appended, for each sequence and
    head apart, and is kept from then on: every stored token is read with what it was written with.

    Args:
        bits: Bits per coordinate.
        scale: What the stored scales are.
        center: Subtract the per-channel mean of the first tokens before quantising, and add it back when reading.
    """

    def __init__(self, bits: float, scale: ScaleRule, *, center: bool) -> None:
        self.bits = bits
        self.scale = scale
        self.center = center
        self.clear()

    def clear(self) -> None:
        """Forget all tokens, and what was taken from the first of them."""
        self._stored: QuantizedTensor | None = None
        self._mean: torch.Tensor | None = None
        self._quantizer: MSEQuantizer | OutlierQuantizer | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens stored for each sequence."""
        return 0 if self._stored is None else self._stored.shape[-1]

    @property
    def token_nbytes(self) -> int:
        """Allocated bytes of codes and scales."""
        return 0 if self._stored is None else self._stored.nbytes

    @property
    def nbytes(self) -> int:
        """Allocated bytes, with the mean and the channel order."""
        return storage_nbytes(self.tensors())

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor that is kept."""
        kept = [] if self._mean is None else [self._mean]
        if isinstance(self._quantizer, OutlierQuantizer):
            kept.append(self._quantizer.channel_order)
        if self._stored is not None:
            kept += [self._stored.codes, self._stored.scales]
        return kept

    def append(self, states: torch.Tensor) -> None:
        """Quantise and store states [batch_size, num_kv_heads, num_tokens, head_dim]."""
        if states.shape[TOKEN_DIM] == 0:
            return
        if self._quantizer is None:
            self._quantizer = self._calibrate(states)
        new = self._quantizer.quantize(self._shifted(states, -1))
        self._stored = new if self._stored is None else QuantizedTensor.cat([self._stored, new], TOKEN_DIM)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """All stored states, [batch_size, num_kv_heads, num_tokens, head_dim].

        Raises:
            RuntimeError: If nothing is stored.
        """
        if self._stored is None or self._quantizer is None:
            raise RuntimeError("there are no stored states to read")
        return self._shifted(self._quantizer.dequantize(self._stored), +1).to(dtype)

    def crop(self, num_tokens: int) -> None:
        """Keep the first `num_tokens` tokens, and free the memory of the others."""
        if self._stored is None:
            return
        if num_tokens == 0:
            self.clear()
        elif num_tokens < self.num_tokens:
            self._stored = self._stored.map(lambda t: t.narrow(TOKEN_DIM, 0, num_tokens).clone())

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply an operation on the batch dimension, or a move to another device, to everything kept."""
        if self._stored is not None:
            self._stored = self._stored.map(function)
        if self._mean is not None:
            self._mean = function(self._mean)
        if isinstance(self._quantizer, OutlierQuantizer):
            self._quantizer = self._quantizer.map(function)

    def _calibrate(self, states: torch.Tensor) -> MSEQuantizer | OutlierQuantizer:
        if self.center:
            self._mean = states.float().mean(TOKEN_DIM, keepdim=True)
        if self.bits in OUTLIER_BITS:
            return OutlierQuantizer.calibrate(self._shifted(states, -1), self.bits, dim=TOKEN_DIM, scale=self.scale)
        return MSEQuantizer(states.shape[-1], int(self.bits), self.scale)

    def _shifted(self, states: torch.Tensor, sign: int) -> torch.Tensor:
        return states if self._mean is None else states.float() + sign * self._mean
