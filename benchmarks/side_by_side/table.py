"""The results as tables in Markdown."""

from collections.abc import Iterator, Mapping
from typing import Any

from side_by_side.caches import REFERENCE
from side_by_side.lifecycle import PASSES

FIGURES = (
    "| cache | bytes / token | against bf16 | mean KL | p99 KL | top-1 | perplexity | decode, against DynamicCache |\n"
    "|---|---|---|---|---|---|---|---|"
)


def markdown(families: Mapping[str, Any]) -> str:
    """Figures of every cache, then the lifecycle rows of each family's first."""
    return "\n".join([FIGURES, *_figures(families), "", *_lifecycle(families)])


def _figures(families: Mapping[str, Any]) -> Iterator[str]:
    for number, family in enumerate(families.values()):
        uncompressed = family["caches"][REFERENCE]
        for name, row in family["caches"].items():
            if "fails" in row:
                yield f"| {name} | {row['fails']} | | | | | | |"
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
                f"{row['tokens_per_second'] / uncompressed['tokens_per_second']:.2f}x",
            ]
            yield f"| {' | '.join(cells)} |"


def _lifecycle(families: Mapping[str, Any]) -> Iterator[str]:
    measured = [
        next(((name, row) for name, row in family["caches"].items() if name != REFERENCE and "lifecycle" in row), None)
        for family in families.values()
    ]
    rows = {REFERENCE: next(iter(families.values()))["caches"][REFERENCE], **dict(filter(None, measured))}
    columns = list(rows[REFERENCE]["lifecycle"])
    yield f"| cache | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    for name, row in rows.items():
        yield f"| {name} | {' | '.join(_outcome(row['lifecycle'][column]) for column in columns)} |"


def _outcome(outcome: str) -> str:
    return "yes" if outcome == PASSES else outcome
