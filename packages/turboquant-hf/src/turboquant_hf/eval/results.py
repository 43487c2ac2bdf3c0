"""What is measured, as it stands in a run file."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Self

MAX_NUMBER = 1e30
"""More than anything that is measured."""


@dataclass(frozen=True)
class Result:
    """Numbers, and lists of them; none is larger than `MAX_NUMBER`."""

    positive: ClassVar[frozenset[str]] = frozenset({"bytes_per_token", "tokens_per_second"})
    """Fields of which nothing is measured without some, and which others are divided by."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: object) -> Self:
        """The result that this data says.

        Raises:
            ValueError: If a field is missing, unknown, of another type, or a number that is never measured.
        """
        expected = {field.name: field.type for field in fields(cls)}
        if not isinstance(data, dict) or data.keys() != expected.keys():
            raise ValueError(f"{cls.__name__} has the fields {', '.join(expected)}")
        for name, kind in expected.items():
            if not _fits(data[name], getattr(kind, "__name__", "")):
                raise ValueError(f"{name} of {cls.__name__} is no {kind}")
            if isinstance(data[name], int | float) and not _is_measured(data[name], name.removeprefix("reference_")):
                raise ValueError(f"{name} of {cls.__name__} is {data[name]:.3g}, which is no measurement")
        return cls(**data)


@dataclass(frozen=True)
class Quality(Result):
    """Next-token distributions over a text, and bytes; see `CacheScore`.

    Attributes:
        num_tokens: Tokens scored.
        mean_kl: Mean KL(uncompressed ‖ cache) per token in nats.
        p99_kl: Its 99th percentile.
        top1_agreement: Share of tokens on which both put the same token first.
        perplexity: Perplexity of the text.
        bytes_per_token: Allocated bytes of the cache for each token of the text.
    """

    num_tokens: int
    mean_kl: float
    p99_kl: float
    top1_agreement: float
    perplexity: float
    bytes_per_token: float


@dataclass(frozen=True)
class LayerError(Result):
    """Squared errors of one layer, relative to the squared norm of what they are errors of.

    Attributes:
        index: Layer index.
        key_error: Of keys, relative to what differs between the keys of a head.
        value_error: Of values.
        output_error: Of the attention's output.
    """

    index: int
    key_error: float
    value_error: float
    output_error: float


@dataclass(frozen=True)
class NeedleScore(Result):
    """What came of a needle.

    Attributes:
        share: Share of the answer's tokens that the model puts first, given those before them.
        found: Whether it is all of them, and so what greedy decoding would answer.
    """

    share: float
    found: bool


@dataclass(frozen=True)
class Greedy(Result):
    """Greedy continuations.

    Attributes:
        tokens: Those of every prompt.
    """

    tokens: list[list[int]]


@dataclass(frozen=True)
class Speed(Result):
    """Decoding speed.

    Attributes:
        tokens_per_second: Of the cache.
        reference_tokens_per_second: Of the uncompressed one, measured in turns with it.
    """

    tokens_per_second: float
    reference_tokens_per_second: float


@dataclass(frozen=True)
class Failure(Result):
    """Why a cache has no result.

    Attributes:
        fails: What went wrong.
    """

    fails: str


def _is_measured(number: float, name: str) -> bool:
    least = 1 / MAX_NUMBER if name in Result.positive else 0 if isinstance(number, int) else -MAX_NUMBER
    return least <= number <= MAX_NUMBER


def _fits(value: object, kind: str) -> bool:
    if kind == "float":
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "list":
        return isinstance(value, list) and all(
            isinstance(row, list) and all(isinstance(token, int) for token in row) for row in value
        )
    return type(value).__name__ == kind
