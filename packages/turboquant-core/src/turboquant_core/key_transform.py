"""What keys go through before they become codes, and queries and dequantised keys because of it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIN_SCALE, MAX_SCALE = 1e-3, 1e3
PART_DTYPES = {"key_mean": torch.float32, "key_scale": torch.float32, "key_channel_order": torch.int64}
"""Types of mean, scale and order, by their names in files."""
PART_LIMITS = {
    "key_mean": ("it must be finite", "Take it from finite keys, as turboquant_core.centring.mean_key does"),
    "key_scale": (
        f"it must be {MIN_SCALE:g} to {MAX_SCALE:g}, for scales of codes are float16",
        "Multiply all scales of a head by one number: keys come back the same",
    ),
    "key_channel_order": ("it must name every channel of a head once", "Take it from an argsort"),
}
"""What their values must be, and what helps."""

Parts = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@dataclass(frozen=True, eq=False)
class KeyTransform:
    """What is stored of a key k is ((k - mean) * scale)[order], each of its KV head; by default k as it is.

    With (q / scale)[order] for a query q, scores of stored keys are those of keys less their mean. What they lack,
    q · mean, is the same for all keys of a head: softmax does not see it, but a softcap, sinks and the log-sum-exp do.

    Codes err by a share of what is stored: a mean far from the keys costs as much as if keys were so long.

    A scale holds at every position if it commutes with the rotary embedding, as one number for both channels of a
    rotary pair does. Nothing here can see whether it does.

    Attributes:
        mean: float32 [num_kv_heads, head_dim], or [rows, num_kv_heads, head_dim] for one of each row; None for zeros.
        scale: float32 of the same shape, from 0.001 to 1000; None for ones.
        order: int64 of the same shape, the channel of the key that each stored channel is, those whose error costs most
            first; None for all channels as they come.

    Raises:
        TypeError: If one of them is no tensor.
        ValueError: If a type or shape does not fit, a mean is not finite, a scale is not from 0.001 to 1000, or an
            order does not name every channel of a head once. To see that, it waits for their device.
    """

    mean: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def __init_subclass__(cls) -> None:
        raise TypeError(
            f"{cls.__name__} is a subclass of KeyTransform, whose methods give plain ones. Write another kind of "
            "transform as a function that gives one of some mean, scale and order."
        )

    def __post_init__(self) -> None:
        tensors = self.tensors()
        for name, tensor in tensors.items():
            _check_type(name, tensor)
        if tensors:
            _check_one_kind(tensors)
        _check_values(tensors)

    @classmethod
    def of_parts(
        cls, mean: torch.Tensor | None, scale: torch.Tensor | None, order: torch.Tensor | None
    ) -> "KeyTransform":
        """The transform of tensors whose values are right, such as another's `parts`: no device is waited for."""
        transform = object.__new__(cls)
        for name, part in (("mean", mean), ("scale", scale), ("order", order)):
            object.__setattr__(transform, name, part)
        return transform

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> "KeyTransform":
        """The transform that `tensors` named so; other names are passed over."""
        return cls(*(tensors.get(name) for name in PART_DTYPES))

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file keeps of it, by name; the identity is nothing."""
        return {name: part for name, part in zip(PART_DTYPES, self.parts, strict=True) if part is not None}

    @property
    def parts(self) -> Parts:
        """Mean, scale and order, for operations that take tensors alone."""
        return self.mean, self.scale, self.order

    @property
    def only_centres(self) -> bool:
        """Whether there is neither a scale nor an order."""
        return self.scale is None and self.order is None

    def check(self, num_kv_heads: int, head_dim: int) -> None:
        """Refuse what is not for keys of these sizes, or has wrong values.

        Raises:
            ValueError: If it is not.
        """
        types = tensor_types(num_kv_heads, head_dim)
        tensors = self.tensors()
        for name, tensor in tensors.items():
            dtype, shape = types[name]
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                expected = f"{_short(dtype)} {list(shape)}"
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; these keys need {expected}")
        _check_values(tensors)

    def of_keys(self, keys: torch.Tensor) -> torch.Tensor:
        """What is stored of keys [..., num_kv_heads, head_dim], in float32; the keys themselves for the identity."""
        if self.mean is not None:
            keys = keys.float() - self.mean
        if self.scale is not None:
            keys = keys.float() * self.scale
        return keys if self.order is None else _taken(keys.float(), self.order)

    def of_query(self, query: torch.Tensor, query_start_loc: torch.Tensor | None = None) -> torch.Tensor:
        """What attends to stored keys in the place of a query, in float32; the query itself with a mean alone.

        Args:
            query: [num_tokens, num_heads, head_dim], the tokens of every row one after another.
            query_start_loc: int32 [rows + 1], the first token of every row; None when all rows have equally many.
        """
        num_tokens, num_heads, head_dim = query.shape
        for part, apply in ((self.scale, torch.div), (self.order, _taken)):
            if part is not None:
                num_kv_heads = part.shape[-2]
                grouped = query.float().reshape(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
                query = apply(grouped, _of_tokens(part, num_tokens, query_start_loc)).view(query.shape)
        return query

    def restored(self, stored: torch.Tensor) -> torch.Tensor:
        """The keys of what is stored of them, float32 or wider [..., num_kv_heads, head_dim]; may overwrite it."""
        if self.order is not None:
            stored = torch.empty_like(stored).scatter_(-1, self.order.expand_as(stored), stored)
        if self.scale is not None:
            stored = stored.div_(self.scale)
        return stored if self.mean is None else stored.add_(self.mean)

    @property
    def stored_mean(self) -> torch.Tensor | None:
        """The mean as keys are stored less of it: scaled, and in the order of stored channels."""
        if self.mean is None:
            return None
        mean = self.mean if self.scale is None else self.mean * self.scale
        return mean if self.order is None else _taken(mean, self.order)

    def without_mean(self) -> "KeyTransform":
        """The transform of keys less their mean: for whoever does not see the mean."""
        return self if self.mean is None else self.of_parts(None, self.scale, self.order)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "KeyTransform":
        """The transform with `function`, a choice of heads or rows or a move, applied to every tensor."""
        return self.of_parts(*(None if part is None else function(part) for part in self.parts))

    def shard(self, heads: slice) -> "KeyTransform":
        """The transform of some of the KV heads, as of one rank of tensor parallelism."""
        return self.map(lambda part: part[..., heads, :])

    def of_row(self, row: int) -> "KeyTransform":
        """The transform of one row, where every row has its own."""
        return self.map(lambda part: part[row] if part.ndim == 3 else part)


def tensor_types(num_kv_heads: int, head_dim: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """The types and shapes of what `KeyTransform.tensors` may name."""
    return {name: (dtype, (num_kv_heads, head_dim)) for name, dtype in PART_DTYPES.items()}


def _taken(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The channels of x in an order of each head."""
    shape = torch.broadcast_shapes(x.shape, order.shape)  # type: ignore[no-untyped-call]
    return x.expand(shape).gather(-1, order.expand(shape))


def _of_tokens(part: torch.Tensor, num_tokens: int, query_start_loc: torch.Tensor | None) -> torch.Tensor:
    """A part as the grouped query heads of every token need it, [(num_tokens,) num_kv_heads, 1, head_dim]."""
    if part.ndim == 3:
        if query_start_loc is None:
            part = part[:, None].expand(-1, num_tokens // len(part), -1, -1).flatten(0, 1)
        else:
            token = torch.arange(num_tokens, dtype=query_start_loc.dtype, device=part.device)
            part = part[torch.searchsorted(query_start_loc[1:], token, right=True).clamp(max=len(part) - 1)]
    return part.unsqueeze(-2)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_type(name: str, part: object) -> None:
    """Refuse what is no tensor of the part's type and dimensions, with or without rows; looks at no values."""
    expected = f"{_short(PART_DTYPES[name])} [num_kv_heads, head_dim], or one for each row"
    if not isinstance(part, torch.Tensor):
        raise TypeError(f"{name} is a {type(part).__name__}; it must be a tensor, {expected}")
    if part.dtype != PART_DTYPES[name] or part.ndim not in (2, 3) or 0 in part.shape:
        raise ValueError(f"{name} is {part.dtype} {list(part.shape)}; it must be {expected}")


def _check_one_kind(tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse parts of other heads, channels, rows or devices than the first."""
    (first, one), *others = tensors.items()
    for name, other in others:
        rows_differ = one.ndim == other.ndim == 3 and len(one) != len(other)
        if one.shape[-2:] != other.shape[-2:] or rows_differ:
            raise ValueError(
                f"{first} is {list(one.shape)} and {name} is {list(other.shape)}; they must be of the same rows, "
                "heads and head_dim"
            )
        if one.device != other.device:
            raise ValueError(f"{first} is on {one.device} and {name} on {other.device}; move them to one device")


def _check_values(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        # What is on no device holds nothing.
        if tensor.is_meta:
            continue
        wrong = wrong_values(name, tensor)
        if bool(wrong.any()):
            limit, remedy = PART_LIMITS[name]
            raise ValueError(f"{name} holds {tensor[wrong][0].item()}; {limit}. {remedy}.")


def wrong_values(name: str, part: torch.Tensor) -> torch.Tensor:
    """Which entries of a part, named as in files, no transform has; bool of its shape."""
    if name == "key_mean":
        return ~part.isfinite()
    if name == "key_scale":
        return ~((part >= MIN_SCALE) & (part <= MAX_SCALE))
    in_order = part.sort(-1)
    wrong = (in_order.values < 0) | (in_order.values >= part.shape[-1])
    wrong[..., 1:] |= in_order.values.diff(dim=-1) == 0
    return torch.empty_like(wrong).scatter_(-1, in_order.indices, wrong)


IDENTITY = KeyTransform()
