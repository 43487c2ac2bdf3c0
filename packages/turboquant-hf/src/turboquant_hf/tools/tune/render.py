"""What `turboquant tune` prints."""

from rich.console import Console
from rich.table import Table

from turboquant_hf.tools.tune.search import Choice, Tuned


def render(found: Tuned, model: str, held_out_tokens: int, console: Console) -> None:
    """Print the bits of every layer, what they give beside uniform ones, and which are better."""
    layers = Table(title=f"{model}: bits of every layer, {found.target_bits:g} at most in the mean")
    for name in ("layers", "keys", "values"):
        layers.add_column(name, justify="right")
    for indices, (key_bits, value_bits) in _runs(found.tuned):
        layers.add_row(indices, f"{key_bits:g}", f"{value_bits:g}")
    console.print(layers)
    table = Table(title=f"On {held_out_tokens:,} other tokens (KL in nats per token, against the uncompressed cache)")
    table.add_column("key/value bits", no_wrap=True)
    for name in ("bytes / token", "mean KL", "p99 KL", "top-1", "perplexity"):
        table.add_column(name, justify="right")
    for choice in (found.tuned, *found.uniform):
        score = choice.held_out
        table.add_row(
            choice.name,
            f"{choice.token_nbytes:,}",
            f"{score.mean_kl:.4f}",
            f"{score.p99_kl:.3f}",
            f"{score.top1_agreement:.1%}",
            f"{score.perplexity:.3f}",
        )
    console.print(table)
    console.print(verdict(found))


def verdict(found: Tuned) -> str:
    """Which are better, and what to do."""
    best = found.uniform[0]
    ours, theirs = found.tuned.held_out.mean_kl, best.held_out.mean_kl
    if found.is_better:
        return f"tuned bits have {1 - ours / theirs:.0%} less KL than {best.name} in every layer"
    key_bits, value_bits = next(iter(best.bits.values()))
    return (
        f"tuned bits are no better here: {best.name} in every layer has a KL of {theirs:.4f} against {ours:.4f}. Use "
        f"TurboQuantCache(model.config, key_bits={key_bits:g}, value_bits={value_bits:g}), or tune on more --tokens of "
        "text like that of your use."
    )


def _runs(choice: Choice) -> list[tuple[str, tuple[float, float]]]:
    """Neighbouring layers with the same bits, and those bits."""
    runs: list[tuple[list[int], tuple[float, float]]] = []
    for index, pair in sorted(choice.bits.items()):
        if runs and runs[-1][1] == pair:
            runs[-1][0].append(index)
        else:
            runs.append(([index], pair))
    return [
        (str(indices[0]) if len(indices) == 1 else f"{indices[0]} to {indices[-1]}", pair) for indices, pair in runs
    ]
