"""The results as tables in Markdown."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

REFERENCE = "DynamicCache"
PASSES = "passes"
COLUMNS = ("cache", "bytes / token", "against bf16", "mean KL", "p99 KL", "top-1", "perplexity")
SPEED = "decode, against DynamicCache"


def markdown(families: Mapping[str, Any], *, with_speed: bool) -> str:
    """Figures of every cache, then the lifecycle rows of each family's first."""
    return "\n".join([*figures(families, with_speed=with_speed), "", *lifecycle_rows(families)])


def figures(families: Mapping[str, Any], *, with_speed: bool) -> Iterator[str]:
    """A table of every cache's figures."""
    columns = (*COLUMNS, SPEED) if with_speed else COLUMNS
    yield _row(columns)
    yield "|---" * len(columns) + "|"
    for number, family in enumerate(families.values()):
        uncompressed = family["caches"][REFERENCE]
        for name, row in family["caches"].items():
            if "fails" in row:
                yield _row([name, row["fails"], *[""] * (len(columns) - 2)])
                continue
            if name == REFERENCE and number > 0:
                continue
            cells = [
                name,
                f"{row['bytes_per_token']:,.0f}",
                f"{uncompressed['bytes_per_token'] / row['bytes_per_token']:.2f}x",
                f"{row['mean_kl']:.4f}",
                f"{row['p99_kl']:.3f}",
                f"{row['top1_agreement']:.1%}",
                f"{row['perplexity']:.3f}",
            ]
            if with_speed:
                cells.append(f"{row['tokens_per_second'] / uncompressed['tokens_per_second']:.2f}x")
            yield _row(cells)


def lifecycle_rows(families: Mapping[str, Any]) -> Iterator[str]:
    """A table of what the first cache of each family passes."""
    measured = [
        next(((name, row) for name, row in family["caches"].items() if name != REFERENCE and "lifecycle" in row), None)
        for family in families.values()
    ]
    rows = {REFERENCE: next(iter(families.values()))["caches"][REFERENCE], **dict(filter(None, measured))}
    columns = list(rows[REFERENCE]["lifecycle"])
    yield _row(["cache", *columns])
    yield "|---" * (len(columns) + 1) + "|"
    for name, row in rows.items():
        yield _row([name, *(_outcome(row["lifecycle"][column]) for column in columns)])


def _outcome(outcome: str) -> str:
    return "yes" if outcome == PASSES else outcome


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
