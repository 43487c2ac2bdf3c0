"""What keys go through before they become codes, and queries and dequantised keys because of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch

# How far the inverse of a matrix, in float32, may be from undoing it.
MAX_RESIDUAL = 1e-3

Parts = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class KeyTransform:
    """What is stored of a key k is A (k - mean), with a matrix A and a mean of its KV head; by default k as it is.

    With A⁻ᵀ q for a query q, scores of stored keys are those of keys less their mean. What they lack, q · mean, is the
    same for all keys of a head: softmax does not see it, but a softcap, sinks and the log-sum-exp do.

    Attributes:
        mean: float32 [num_kv_heads, head_dim], or [rows, num_kv_heads, head_dim] for one of each row; None for zeros.
        matrix: A, float32 [num_kv_heads, head_dim, head_dim], or one of each row; None for the identity.
        inverse: A⁻¹, computed where it is not given.

    Raises:
        ValueError: If the matrix of a head is singular, or so nearly that float32 cannot undo it.
    """

    mean: torch.Tensor | None = None
    matrix: torch.Tensor | None = None
    inverse: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.matrix is not None and self.inverse is None:
            object.__setattr__(self, "inverse", _inverse(self.matrix))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """The transform that `tensors` named so; other names are passed over."""
        return cls(tensors.get("key_mean"), tensors.get("key_matrix"))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file keeps of it, by name; the identity is nothing."""
        named = {"key_mean": self.mean, "key_matrix": self.matrix}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def parts(self) -> Parts:
        """What the constructor takes, for operations that take tensors alone."""
        return self.mean, self.matrix, self.inverse

    def check(self, num_kv_heads: int, head_dim: int) -> None:
        """Refuse what is not for keys of these sizes, or not finite.

        Raises:
            ValueError: If it is not.
        """
        shapes = tensor_shapes(num_kv_heads, head_dim)
        for name, tensor in self.tensors().items():
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shapes[name]:
                expected = f"float32 {list(shapes[name])}"
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; these keys need {expected}")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} is not finite")

    def of_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """What is stored of keys [..., num_kv_heads, head_dim], in float32; the keys themselves for the identity."""
        if self.mean is not None:
            keys = keys.float() - self.mean
        return keys if self.matrix is None else _product(self.matrix, keys.float())

    def of_query(self, query: torch.Tensor, query_start_loc: torch.Tensor | None = None) -> torch.Tensor:
        """What attends to stored keys in the place of a query, in float32; the query itself without a matrix.

        Args:
            query: [num_tokens, num_heads, head_dim], the tokens of every row one after another.
            query_start_loc: int32 [rows + 1], the first token of every row; None when all rows have equally many.
        """
        if self.inverse is None:
            return query
        inverse, (num_tokens, num_heads, head_dim) = self.inverse, query.shape
        num_kv_heads = inverse.shape[-3]
        grouped = query.float().reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
        if inverse.ndim == 4 and query_start_loc is None:
            inverse, grouped = inverse[:, None], grouped.view(len(inverse), -1, *grouped.shape[1:])
        elif inverse.ndim == 4:
            assert query_start_loc is not None
            token = torch.arange(num_tokens, dtype=query_start_loc.dtype, device=query.device)
            inverse = inverse[torch.searchsorted(query_start_loc[1:], token, right=True).clamp(max=len(inverse) - 1)]
        transformed: torch.Tensor = torch.einsum("...hji,...hgj->...hgi", inverse, grouped)
        return transformed.reshape(query.shape)

    def restored(self, stored: torch.Tensor) -> torch.Tensor:
        """The keys of what is stored of them, float32 or wider [..., num_kv_heads, head_dim]; may overwrite it."""
        if self.inverse is not None:
            stored = _product(self.inverse, stored)
        return stored if self.mean is None else stored.add_(self.mean)

    @property
    def stored_mean(self) -> torch.Tensor | None:
        """A mean: what A k is stored less of."""
        return self.mean if self.mean is None or self.matrix is None else _product(self.matrix, self.mean).contiguous()

    def without_mean(self) -> "KeyTransform":
        """The transform of keys less their mean: for whoever does not see the mean."""
        return self if self.mean is None else KeyTransform(None, self.matrix, self.inverse)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "KeyTransform":
        """The transform with `function`, a choice of heads or rows or a move, applied to every tensor."""
        return KeyTransform(*(None if part is None else function(part) for part in self.parts))

    def shard(self, heads: slice) -> "KeyTransform":
        """The transform of some of the KV heads, as of one rank of tensor parallelism."""
        return KeyTransform(
            None if self.mean is None else self.mean[..., heads, :],
            *(None if x is None else x[..., heads, :, :] for x in (self.matrix, self.inverse)),
        )

    def of_row(self, row: int) -> "KeyTransform":
        """The transform of one row, where every row has its own."""
        return KeyTransform(
            self.mean[row] if self.mean is not None and self.mean.ndim == 3 else self.mean,
            *(x[row] if x is not None and x.ndim == 4 else x for x in (self.matrix, self.inverse)),
        )


IDENTITY = KeyTransform()


def tensor_shapes(num_kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what `KeyTransform.tensors` may name, float32."""
    return {"key_mean": (num_kv_heads, head_dim), "key_matrix": (num_kv_heads, head_dim, head_dim)}


def _product(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The matrix of each head times x [..., heads, head_dim], in the type of x."""
    product: torch.Tensor = torch.einsum("...hij,...hj->...hi", matrix.to(x.dtype), x)
    return product


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of every head's matrix, as precise as float32 holds it."""
    wide = matrix.double()
    inverse: torch.Tensor = torch.linalg.inv_ex(wide).inverse.to(matrix.dtype)
    residual = (wide @ inverse.double() - torch.eye(matrix.shape[-1], dtype=wide.dtype, device=wide.device)).abs()
    # A residual of NaN is too large as well.
    if not bool((residual <= MAX_RESIDUAL).all()):
        raise ValueError(
            f"the matrix of keys cannot be undone: its inverse in float32 leaves {residual.max().item():.2g} of the "
            f"identity, and {MAX_RESIDUAL:g} is the most. Use one that is better conditioned."
        )
    return inverse
