"""Results as text of the documentation."""

from collections.abc import Iterable, Sequence
from typing import Any


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in (columns, *rows)]
    lines.insert(1, "|---" * len(columns) + "|")
    return "\n".join(lines)


def nats(value: float) -> str:
    """A divergence."""
    return f"{value:.4f}" if value < 0.1 else f"{value:#.3g}"


def percent(share: float) -> str:
    """A share with one decimal."""
    return f"{100 * share:.1f} %"


def perplexity(score: Any) -> str:
    """The perplexity of a score."""
    return f"{score['perplexity']:.2f}"


def shape(batch: int, context: int) -> str:
    """Rows and tokens of each."""
    return f"{batch} × {context:,}"


def bold_if(condition: bool, text: str) -> str:
    """Bold where that holds."""
    return f"**{text}**" if condition else text
