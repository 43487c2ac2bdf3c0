"""The transform of a layer's keys, settled once before anything is stored."""

import torch

from turboquant_core.key_transform import IDENTITY, KeyTransform


class KeyMean:
    """What all keys of a layer go through before they are stored: pages are shared between requests.

    Its mean is zero, which costs and gains nothing, where a layer is given none.

    Attributes:
        transform: Of tensors without rows, which stay at their addresses once it is settled, the mean from the start.
        is_settled: Whether it was decided what it is.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.transform = KeyTransform(torch.zeros(num_kv_heads, head_dim, dtype=torch.float32, device=device))
        self._device = device
        self.is_settled = False
        self._given = IDENTITY

    def settle(self, transform: KeyTransform = IDENTITY) -> None:
        """Set it to a transform of the same heads."""
        self._given = transform.map(lambda part: part.to("cpu", torch.float32))
        room = self._given.map(lambda part: torch.empty_like(part, device=self._device))
        self.transform = KeyTransform(self.transform.mean, room.matrix, room.inverse)
        self.is_settled = True
        self.restore()

    def restore(self) -> None:
        """Set it again: the device's memory may have been given up meanwhile, and there may be pages that need it."""
        for part, given in zip(self.transform.parts, self._given.parts, strict=True):
            if part is not None:
                part.zero_() if given is None else part.copy_(given)

    def check_settled(self) -> None:
        """Make sure that no key is stored before the mean is known.

        Raises:
            RuntimeError: If it is not.
        """
        if not self.is_settled:
            raise RuntimeError("keys are stored before it was settled what they go through")
