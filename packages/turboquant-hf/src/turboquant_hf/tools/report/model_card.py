"""A part of a model card, in Markdown."""

from collections.abc import Iterator, Sequence

from turboquant_hf._compat import CACHE_ARGUMENT
from turboquant_hf.tools.caches import UNCOMPRESSED
from turboquant_hf.tools.eval.summary import CacheSummary, RunSummary

MARKER = "<!-- made by turboquant report --model-card -->"

COLUMNS = ("cache", "bytes / token", "against bf16", "mean KL", "top-1", "perplexity", "needles")


def model_card(summaries: Sequence[RunSummary]) -> str:
    """The figures of our caches, and how to use the smallest good one, for each run."""
    return f"{MARKER}\n" + "\n\n".join("\n".join(_section(summary)) for summary in summaries) + "\n"


def _section(summary: RunSummary) -> Iterator[str]:
    yield f"## KV-cache compression: {summary.model}"
    yield ""
    best = summary.smallest_good
    if best is not None:
        yield "```python"
        yield "from turboquant_hf import TurboQuantCache"
        yield ""
        yield f'cache = TurboQuantCache(model.config, "{best.cache.name}")'
        yield f"model.generate(**inputs, {CACHE_ARGUMENT}=cache)"
        yield "```"
        yield ""
    yield _row(COLUMNS)
    yield "|---" * len(COLUMNS) + "|"
    for cache in summary.caches:
        if cache.cache.is_ours or cache.cache.name == UNCOMPRESSED:
            yield _row(_cells(cache))
    yield ""
    settings, environment = summary.settings, summary.run.header["environment"]
    yield (
        f"Teacher-forced over {settings.num_tokens:,} tokens with the cache read; {summary.dtype} on {summary.device}; "
        f"turboquant-hf {environment.get('turboquant-hf', 'of an unknown version')}. "
        f"Made by `{summary.run.header.get('command', 'turboquant eval')}`."
    )


def _cells(cache: CacheSummary) -> list[str]:
    quality = cache.quality
    compared = quality is not None and cache.cache.name != UNCOMPRESSED
    return [
        cache.cache.name,
        f"{quality.bytes_per_token:,.0f}" if quality else "-",
        f"{cache.compression:.2f}x" if cache.compression else "-",
        f"{quality.mean_kl:.4f}" if quality and compared else "-",
        f"{quality.top1_agreement:.1%}" if quality and compared else "-",
        f"{quality.perplexity:.3f}" if quality else "-",
        "-" if cache.needle_share is None else f"{cache.needle_share:.0%}",
    ]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
