"""Tokens that are stored as they are, in tensors that are made once."""

from typing import Self

import torch

from turboquant_hf.storage.full_precision import FullPrecision
from turboquant_hf.storage.static.addresses import copy_into, keep_addresses
from turboquant_hf.storage.tables import FullPrecisionSizes


class StaticFullPrecision(FullPrecision):
    """`FullPrecision` in tensors that keep their addresses."""

    def __init__(self, sizes: FullPrecisionSizes, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(sizes, keys, values)
        keep_addresses(keys, values)

    def select(self, rows: torch.Tensor) -> Self:
        """The same, with its rows in another order."""
        copy_into(self.tensors(), super().select(rows).tensors())
        return self
