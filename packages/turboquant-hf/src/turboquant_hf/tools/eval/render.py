"""The tables of `turboquant eval`."""

from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from turboquant_hf.tools.caches import UNCOMPRESSED
from turboquant_hf.tools.eval.summary import RunSummary


def render(summary: RunSummary, console: Console) -> None:
    """Print what was found, cache by cache."""
    if "quality" in summary.settings.measurements:
        console.print(_quality(summary))
    if {"needle", "greedy", "speed"} & set(summary.settings.measurements):
        console.print(_reading(summary))
    if "layers" in summary.settings.measurements:
        console.print(_layers(summary))
    for cache in summary.caches:
        if cache.fails:
            console.print(f"{cache.cache.name} fails: {cache.fails}", markup=False, highlight=False)
    console.print(f"{summary.model} in {summary.dtype} on {summary.device}", style="dim", highlight=False)


def _quality(summary: RunSummary) -> Table:
    scored = next((cache.quality.num_tokens for cache in summary.caches if cache.quality), 0)
    table = _table(f"{summary.model}: {scored:,} tokens scored (KL in nats per token, against the uncompressed cache)")
    for name in ("bytes / token", "vs bf16", "mean KL", "p99 KL", "top-1", "perplexity"):
        table.add_column(name, justify="right")
    for cache in summary.caches:
        quality, compared = cache.quality, cache.cache.name != UNCOMPRESSED
        if quality is None:
            table.add_row(cache.cache.name, *["-"] * 6)
            continue
        table.add_row(
            cache.cache.name,
            f"{quality.bytes_per_token:,.0f}",
            number(cache.compression, "{:.2f}x".format),
            f"{quality.mean_kl:.4f}" if compared else "",
            f"{quality.p99_kl:.3f}" if compared else "",
            f"{quality.top1_agreement:.1%}" if compared else "",
            f"{quality.perplexity:.3f}",
        )
    return table


def _reading(summary: RunSummary) -> Table:
    settings = summary.settings
    table = _table("What is read back")
    num_needles = len(settings.needle_lengths) * len(settings.needle_depths)
    table.add_column(f"needles found, of {num_needles}", justify="right")
    table.add_column("answer tokens right", justify="right")
    table.add_column(f"greedy tokens shared, of {settings.greedy_tokens}", justify="right")
    table.add_column("decode, vs uncompressed", justify="right")
    for cache in summary.caches:
        table.add_row(
            cache.cache.name,
            str(cache.needles_found) if cache.needles else "-",
            number(cache.needle_share, "{:.1%}".format),
            number(cache.mean_greedy, "{:.1f}".format),
            number(cache.speed_ratio, "{:.2f}x".format),
        )
    return table


def _layers(summary: RunSummary) -> Table:
    table = _table("Squared error of single layers, relative; the worst layer in brackets")
    for name in ("keys", "values", "attention output"):
        table.add_column(name, justify="right")
    for cache in summary.caches:
        if not cache.layers:
            continue
        cells = [cache.cache.name]
        for field in ("key_error", "value_error", "output_error"):
            errors = {layer.index: getattr(layer, field) for layer in cache.layers}
            worst = max(errors, key=errors.__getitem__)
            mean = sum(errors.values()) / len(errors)
            cells.append(f"{mean:.4f} ({worst}: {errors[worst]:.4f})")
        table.add_row(*cells)
    return table


def number(value: float | None, show: Callable[[float], str]) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else show(value)


def _table(title: str) -> Table:
    table = Table(title=title)
    table.add_column("cache", no_wrap=True)
    return table
