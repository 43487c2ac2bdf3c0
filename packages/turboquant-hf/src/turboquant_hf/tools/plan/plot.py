"""The plot of `turboquant plan`."""

from pathlib import Path

from turboquant_core.files import replacing
from turboquant_hf.tools.doctor.checkpoint import short_name
from turboquant_hf.tools.plan.plan import Plan


def write_plot(plan: Plan, lengths: list[int], path: Path, creator: str) -> None:
    """Draw requests at once against their length, a line for each cache, as SVG that says who made it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for cache in plan.blocks:
        requests = [plan.capacity(cache, length).requests for length in lengths]
        axes.plot(lengths, requests, marker="o", markersize=3, label=cache)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_xlabel("tokens of a request")
    axes.set_ylabel("requests at once")
    axes.set_title(short_name(plan.model))
    axes.grid(alpha=0.3)
    axes.legend()
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="svg", metadata={"Creator": creator})
