"""The demo's tables."""

from rich.console import Console
from rich.table import Table

from turboquant_hf.tools.caches import UNCOMPRESSED
from turboquant_hf.tools.demo.comparison import DemoResult


def render(result: DemoResult, console: Console) -> None:
    """Print answers side by side, then the figures."""
    console.print(_answers(result))
    console.print(_figures(result))
    console.print(
        f"{result.model} in {result.dtype} on {result.device}; {result.runs[0].score.num_tokens:,} tokens scored of a "
        f"prompt of {result.long_prompt_tokens:,}; {result.seconds:.0f} s",
        style="dim",
    )


def _answers(result: DemoResult) -> Table:
    table = Table(title="Answers (greedy)", show_lines=True)
    table.add_column("cache", no_wrap=True)
    table.add_column(result.chat_prompt, ratio=1)
    table.add_column(f"{result.long_prompt_tokens:,}-token prompt: {result.question}", ratio=1)
    for run in result.runs:
        table.add_row(run.cache, run.chat_answer, run.long_answer)
    return table


def _figures(result: DemoResult) -> Table:
    table = Table(title="Measured on the long prompt (KL in nats per token, against the uncompressed cache)")
    table.add_column("cache", no_wrap=True)
    for name in ("bytes / token", "vs bf16", "tokens / s", "mean KL", "p99 KL", "top-1", "ppl"):
        table.add_column(name, justify="right")
    for run in result.runs:
        compared = run.cache != UNCOMPRESSED
        table.add_row(
            run.cache,
            f"{run.bytes_per_token:,.0f}",
            f"{run.compression:.2f}x",
            f"{run.tokens_per_second:.1f}",
            f"{run.score.mean_kl:.4f}" if compared else "",
            f"{run.score.p99_kl:.4f}" if compared else "",
            f"{run.score.top1_agreement:.1%}" if compared else "",
            f"{run.score.perplexity:.3f}",
        )
    return table
