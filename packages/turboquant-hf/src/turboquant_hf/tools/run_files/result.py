"""What is measured in one go, as plain data that is checked when it is read again."""

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
