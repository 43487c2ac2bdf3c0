"""The mean that is subtracted from keys before they are quantised."""

import torch

from turboquant_core.scale import is_storable


def mean_key(keys: torch.Tensor, counts: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over tokens of the keys that come back finite.

    A key with NaN or inf in it, or one too long to store, would take all others of its head along. Nothing waits for
    the device.

    Args:
        keys: Floating point [num_tokens, heads, head_dim].
        counts: bool [num_tokens, heads], or what broadcasts to it: which keys to take it from; None for all.

    Returns:
        float32 [heads, head_dim]; zeros for a head that has no such key.
    """
    counted = is_storable(keys) if counts is None else counts & is_storable(keys)
    total = torch.where(counted[..., None], keys, 0).sum(0, dtype=torch.float32)
    return total / counted.sum(0).clamp(min=1)[..., None]
