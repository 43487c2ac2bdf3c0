"""What keys go through before they become codes, and queries and dequantised keys because of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

# Undoing a matrix multiplies the error of codes by up to its condition number: at 1000 the codes of white noise at
# 8 bits come back 0.5 off, relative to their norm, instead of 0.006, and float32 itself 2e-5.
MAX_CONDITION = 1e3
# Of the largest singular value: the scales of what is stored are float16.
MIN_NORM, MAX_NORM = 1e-2, 1e2

Parts = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class KeyTransform:
    """What is stored of a key k is A (k - mean), with a matrix A and a mean of its KV head; by default k as it is.

    With A⁻ᵀ q for a query q, scores of stored keys are those of keys less their mean. What they lack, q · mean, is the
    same for all keys of a head: softmax does not see it, but a softcap, sinks and the log-sum-exp do.

    Codes err by a share of what is stored: a mean far from the keys costs as much as if keys were so long.

    Attributes:
        mean: float32 [num_kv_heads, head_dim], or [rows, num_kv_heads, head_dim] for one of each row; None for zeros.
        matrix: A, float32 [num_kv_heads, head_dim, head_dim], or one of each row; None for the identity.

    Raises:
        TypeError: If one of them is no tensor.
        ValueError: If a type or shape does not fit, a mean or matrix is not finite, or the matrix of a head has a
            condition number above 1000, or a largest singular value that is not from 0.01 to 100. To see that, it
            waits for their device.
    """

    mean: torch.Tensor | None = None
    matrix: torch.Tensor | None = None
    _inverse: torch.Tensor | None = field(default=None, init=False, repr=False)

    def __init_subclass__(cls) -> None:
        raise TypeError(
            f"{cls.__name__} is a subclass of KeyTransform, whose methods give plain ones. Write another kind of "
            "transform as a classmethod that gives one of some mean and matrix."
        )

    def __post_init__(self) -> None:
        _check_part("key_mean", self.mean, 2)
        _check_part("key_matrix", self.matrix, 3)
        if self.matrix is not None and self.matrix.shape[-1] != self.matrix.shape[-2]:
            raise ValueError(f"key_matrix is {list(self.matrix.shape)}; the matrix of a head must be square")
        if self.mean is not None and self.matrix is not None:
            _check_one_kind(self.mean, self.matrix)
        if self.mean is not None:
            _check_finite(self.mean)
        if self.matrix is not None:
            object.__setattr__(self, "_inverse", _inverse_of(self.matrix))

    @classmethod
    def of_parts(
        cls, mean: torch.Tensor | None, matrix: torch.Tensor | None, inverse: torch.Tensor | None
    ) -> "KeyTransform":
        """The transform of tensors whose values are right, such as another's `parts`: no device is waited for."""
        transform = object.__new__(cls)
        for name, part in (("mean", mean), ("matrix", matrix), ("_inverse", inverse)):
            object.__setattr__(transform, name, part)
        return transform

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "KeyTransform":
        """The transform that `tensors` named so; other names are passed over."""
        return cls(tensors.get("key_mean"), tensors.get("key_matrix"))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file keeps of it, by name; the identity is nothing."""
        named = {"key_mean": self.mean, "key_matrix": self.matrix}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def parts(self) -> Parts:
        """Mean, matrix and its inverse, for operations that take tensors alone."""
        return self.mean, self.matrix, self._inverse

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
        if self._inverse is None:
            return query
        inverse, (num_tokens, num_heads, head_dim) = self._inverse, query.shape
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
        if self._inverse is not None:
            stored = _product(self._inverse, stored)
        return stored if self.mean is None else stored.add_(self.mean)

    @property
    def stored_mean(self) -> torch.Tensor | None:
        """A mean: what A k is stored less of."""
        return self.mean if self.mean is None or self.matrix is None else _product(self.matrix, self.mean).contiguous()

    def without_mean(self) -> "KeyTransform":
        """The transform of keys less their mean: for whoever does not see the mean."""
        return self if self.mean is None else self.of_parts(None, self.matrix, self._inverse)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "KeyTransform":
        """The transform with `function`, a choice of heads or rows or a move, applied to every tensor."""
        return self.of_parts(*(None if part is None else function(part) for part in self.parts))

    def shard(self, heads: slice) -> "KeyTransform":
        """The transform of some of the KV heads, as of one rank of tensor parallelism."""
        return self.of_parts(
            None if self.mean is None else self.mean[..., heads, :],
            *(None if x is None else x[..., heads, :, :] for x in (self.matrix, self._inverse)),
        )

    def of_row(self, row: int) -> "KeyTransform":
        """The transform of one row, where every row has its own."""
        return self.of_parts(
            self.mean[row] if self.mean is not None and self.mean.ndim == 3 else self.mean,
            *(x[row] if x is not None and x.ndim == 4 else x for x in (self.matrix, self._inverse)),
        )


def tensor_shapes(num_kv_heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """The shapes of what `KeyTransform.tensors` may name, float32."""
    return {"key_mean": (num_kv_heads, head_dim), "key_matrix": (num_kv_heads, head_dim, head_dim)}


def _product(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The matrix of each head times x [..., heads, head_dim], in the type of x."""
    product: torch.Tensor = torch.einsum("...hij,...hj->...hi", matrix.to(x.dtype), x)
    return product


def _check_part(name: str, part: object, ndim: int) -> None:
    """Refuse what is no float32 tensor of a head's dimensions, with or without rows; looks at no values."""
    if part is None:
        return
    shape = ", ".join(["num_kv_heads", *["head_dim"] * (ndim - 1)])
    expected = f"float32 [{shape}], or one for each row"
    if not isinstance(part, torch.Tensor):
        raise TypeError(f"{name} is a {type(part).__name__}; it must be a tensor, {expected}")
    if part.dtype != torch.float32 or part.ndim not in (ndim, ndim + 1) or 0 in part.shape:
        raise ValueError(f"{name} is {part.dtype} {list(part.shape)}; it must be {expected}")


def _check_one_kind(mean: torch.Tensor, matrix: torch.Tensor) -> None:
    rows_differ = mean.ndim == 3 and matrix.ndim == 4 and len(mean) != len(matrix)
    if mean.shape[-2:] != matrix.shape[-3:-1] or rows_differ:
        raise ValueError(
            f"key_mean is {list(mean.shape)} and key_matrix is {list(matrix.shape)}; they must be of the same rows, "
            "heads and head_dim"
        )
    if mean.device != matrix.device:
        raise ValueError(f"key_mean is on {mean.device} and key_matrix on {matrix.device}; move them to one device")


def _check_finite(mean: torch.Tensor) -> None:
    # What is on no device holds nothing.
    if not mean.is_meta and not bool(mean.isfinite().all()):
        raise ValueError("key_mean is not finite. Take it from finite keys, as turboquant_core.centring.mean_key does.")


def _inverse_of(matrix: torch.Tensor) -> torch.Tensor:
    """The inverse of every head's matrix, as precise as float32 holds it."""
    if not bool(matrix.isfinite().all()):
        raise ValueError("key_matrix is not finite")
    wide = matrix.double()
    values = torch.linalg.svdvals(wide)
    largest, smallest = values[..., 0], values[..., -1]
    condition = torch.where(smallest > 0, largest / smallest, torch.inf).max().item()
    if condition > MAX_CONDITION:
        raise ValueError(
            f"key_matrix cannot be undone: the condition number of a head is {condition:.3g}, "
            f"by which the error of codes grows, and {MAX_CONDITION:g} is the most. Use one that is better conditioned."
        )
    for norm in (largest.min().item(), largest.max().item()):
        if not MIN_NORM <= norm <= MAX_NORM:
            raise ValueError(
                f"the largest singular value of key_matrix is {norm:.3g} for a head, and {MIN_NORM:g} to {MAX_NORM:g} "
                "is what scales in float16 hold. Multiply it by a number: keys come back the same."
            )
    inverse: torch.Tensor = torch.linalg.inv(wide).to(matrix.dtype)
    return inverse


IDENTITY = KeyTransform()
