"""The key mean of a layer, settled once before anything is stored."""

import torch


class KeyMean:
    """A mean that all keys of a layer are stored less of: pages are shared between requests.

    It is zero, which costs and gains nothing, where a layer is given none.

    Attributes:
        mean: float32 [num_kv_heads, head_dim], always at the same address.
        is_settled: Whether it was decided what the mean is.
    """

    def __init__(self, num_kv_heads: int, head_dim: int, device: torch.device) -> None:
        self.mean = torch.zeros(num_kv_heads, head_dim, dtype=torch.float32, device=device)
        self.is_settled = False
        self._given: torch.Tensor | None = None

    def settle(self, mean: torch.Tensor | None) -> None:
        """Set the mean to one of the same shape, or leave it at zero."""
        self._given = None if mean is None else mean.to("cpu", torch.float32)
        self.is_settled = True
        self.restore()

    def restore(self) -> None:
        """Set it again: the device's memory may have been given up meanwhile, and there may be pages that need it."""
        if self._given is None:
            self.mean.zero_()
        else:
            self.mean.copy_(self._given)

    def check_settled(self) -> None:
        """Make sure that no key is stored before the mean is known.

        Raises:
            RuntimeError: If it is not.
        """
        if not self.is_settled:
            raise RuntimeError("keys are stored before it was settled what their mean is")
