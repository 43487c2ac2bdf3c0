"""The table of `turboquant plan`."""

from rich.console import Console
from rich.table import Table

from turboquant_hf.tools.doctor.cards import GIB
from turboquant_hf.tools.doctor.checkpoint import short_name
from turboquant_hf.tools.plan.plan import Plan


def render(plan: Plan, memory: str, console: Console) -> None:
    """Print what fits; `memory` says what the memory for the cache was worked out from."""
    cards = f"each of {plan.tensor_parallel} cards" if plan.tensor_parallel > 1 else "one card"
    table = Table(title=f"{short_name(plan.model)}: {plan.kv_bytes / GIB:.2f} GiB for the KV cache on {cards}")
    table.add_column("cache", no_wrap=True)
    for name in ("KV tokens", "against bf16", f"requests of {plan.length:,} tokens at once"):
        table.add_column(name, justify="right")
    for row in plan.rows():
        table.add_row(
            row.cache,
            f"{row.capacity.tokens:,}",
            "-" if row.against_bf16 is None else f"{row.against_bf16:.2f}x",
            f"{row.capacity.requests:,.1f}",
        )
    console.print(table)
    console.print(memory, style="dim")
