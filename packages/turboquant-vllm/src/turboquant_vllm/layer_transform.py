"""The transform of a layer's keys, settled once before anything is stored."""

import torch

from turboquant_core.key_transform import IDENTITY, KeyTransform


class LayerTransform:
    """What all keys of a layer go through before they are stored: pages are shared between requests.

    Attributes:
        is_settled: Whether it was decided what it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._given = self._on_device = IDENTITY
        self.is_settled = False

    @property
    def settled(self) -> KeyTransform:
        """The transform, of tensors without rows that stay at their addresses.

        Raises:
            RuntimeError: If it is not settled: a key would be stored that went through nothing.
        """
        if not self.is_settled:
            raise RuntimeError("keys are stored before it was settled what they go through")
        return self._on_device

    def settle(self, transform: KeyTransform = IDENTITY) -> None:
        """Set it to a transform of the layer's heads."""
        self._given = transform.map(lambda part: part.to("cpu"))
        self._on_device = self._given.map(lambda part: part.to(self._device, copy=True))
        self.is_settled = True

    def restore(self) -> None:
        """Set it again: the device's memory may have been given up meanwhile, and there may be pages that need it."""
        for part, given in zip(self._on_device.parts, self._given.parts, strict=True):
            if part is not None and given is not None:
                part.copy_(given)
