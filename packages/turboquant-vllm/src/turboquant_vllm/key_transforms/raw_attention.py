"""Attention on a text as it is, which takes the mean of its keys."""

from typing import TYPE_CHECKING, Any

import torch

from turboquant_core.key_transform import IDENTITY, KeyTransform

if TYPE_CHECKING:
    from turboquant_vllm.impl import TurboQuantImpl


class RawAttention:
    """Attends in a layer's place on keys and values as they are, and adds up the keys.

    Args:
        impl: The layer's implementation of ours, whether or not it is in use.
        shared: The layer whose keys and values it reads instead of its own, or None.
    """

    def __init__(self, impl: "TurboQuantImpl", shared: "RawAttention | None") -> None:
        self._impl, self._shared = impl, shared
        self._total: torch.Tensor | int = 0
        self._num_tokens = 0
        self._key_value: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: None,
        output: torch.Tensor,
        **scales: Any,
    ) -> torch.Tensor:
        """Attend causally with query [num_tokens, num_heads, head_dim] of one text and write `output`."""
        if self._shared is not None:
            assert self._shared._key_value is not None
            key, value = self._shared._key_value
        else:
            self._key_value = key, value
            self._total = self._total + key.sum(dim=0, dtype=torch.float32)
            self._num_tokens += len(key)
        start_loc = torch.tensor([0, len(query)], dtype=torch.int32, device=query.device)
        num_tokens, sinks = len(query), self._impl.sinks
        self._impl.dense_attention(
            query, key, value, start_loc, start_loc, num_tokens, num_tokens, causal=True, sinks=sinks, out=output
        )
        return output

    def settle(self) -> bool:
        """Settle the layer's mean, and say whether there was a finite one, or need of none."""
        transform = self._impl.key_transform
        if transform.is_settled or self._shared is not None:
            return True
        assert isinstance(self._total, torch.Tensor)
        mean = self._total / self._num_tokens
        is_finite = bool(mean.isfinite().all())
        transform.settle(KeyTransform(mean) if is_finite else IDENTITY)
        return is_finite
