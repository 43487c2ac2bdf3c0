"""The value that every quantiser produces."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Vectors stored as codes and scales, and nothing else.

    The leading dimensions are those of the input [..., head_dim]; each vector owns one row of `codes` and one of
    `scales`, so indexing, concatenating or repeating along any leading dimension is exact.

    Attributes:
        codes: uint8 [..., code_bytes], packed.
        scales: float16 [..., num_scales], in the format of `turboquant_core.scale`.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of memory that this value keeps allocated, which for a view is that of the whole base."""
        return storage_nbytes((self.codes, self.scales))

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions: one stored vector for each index."""
        return self.codes.shape[:-1]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "QuantizedTensor":
        """Apply an operation on leading dimensions, or a move to another device, to codes and scales alike."""
        return QuantizedTensor(function(self.codes), function(self.scales))

    @staticmethod
    def cat(parts: Iterable["QuantizedTensor"], dim: int) -> "QuantizedTensor":
        """Concatenate along one leading dimension; negative `dim` counts the vector dimension, as in torch."""
        parts = list(parts)
        return QuantizedTensor(
            torch.cat([part.codes for part in parts], dim),
            torch.cat([part.scales for part in parts], dim),
        )


def check_stored(q: QuantizedTensor, code_bytes: int, num_scales: int, vectors: str) -> None:
    """Raise ValueError unless each stored vector has that many code bytes and scales; `vectors` names the format."""
    if (q.codes.shape[-1], q.scales.shape[-1]) != (code_bytes, num_scales):
        raise ValueError(
            f"got {q.codes.shape[-1]} code bytes and {q.scales.shape[-1]} scales; {vectors} have {code_bytes} and "
            f"{num_scales}"
        )


def storage_nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Allocated bytes behind the tensors, each storage counted once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({(s.device, s.data_ptr()): s.nbytes() for s in storages}.values())
