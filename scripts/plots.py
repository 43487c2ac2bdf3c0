"""Draw the plots of docs/index.md from benchmarks/results/ into docs/assets/."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from figures import ROOT, checksum

from engine_tables import LABELS, shapes_of_all
from results_file import read_result
from side_by_side.table import of_model

COLOURS = {"bf16": "#9aa0a6", "fp8": "#5f6b7a", "tq4": "#4051b5"}
# Families of benchmarks/eval_side_by_side.py: colour, marker, and how the first is called here.
FAMILIES = {
    "turboquant": ("#4051b5", "o", "TurboQuant"),
    "turboquant, calibrated": ("#1a237e", "P", "TurboQuant, calibrated"),
    "turboquant, codes only": ("#9fa8da", "o", "TurboQuant, codes only"),
    "quanto": ("#d9822b", "s", "quanto"),
    "quanto, keys by channel": ("#8e5a1d", "D", "quanto, keys by channel"),
    "hqq": ("#2e8b57", "^", "hqq"),
    "hqq, keys by channel": ("#14532d", "v", "hqq, keys by channel"),
    "fp8": ("#5f6b7a", "*", "fp8"),
}
MODELS = {"SmolLM2-135M": "smollm2", "Qwen2.5-Coder-1.5B": "qwen2.5-coder-1.5b"}
# Where a cache has lost the model, how far does not matter.
LARGEST_KL = 10


def save(figure: Any, name: str, sources: Sequence[str]) -> None:
    """Write a plot that says which files it was drawn from."""
    path = ROOT / "docs" / "assets" / f"{name}.svg"
    metadata = {"Date": None, "Creator": None, "Source": ", ".join(checksum(source) for source in sources)}
    figure.savefig(path, metadata=metadata)


def engine(plt: Any) -> None:
    """Decode steps in vLLM as bars, and tokens that fit."""
    data = read_result("engine")
    shapes = sorted(shapes_of_all(), key=lambda shape: shape[0])
    figure, (time, room) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=(3, 1))
    for number, (name, label) in enumerate(LABELS.items()):
        cache = data["caches"][name]
        steps = {(step["batch"], step["context"]): step["decode_step_ms"] for step in cache["steps"]}
        places = [place + 0.27 * (number - 1) for place in range(len(shapes))]
        heights = [steps[shape] for shape in shapes]
        bars = time.bar(places, heights, 0.25, color=COLOURS[name], label=label.replace("`", ""))
        time.bar_label(bars, fmt="%.1f", fontsize="small")
        tokens = cache["kv_tokens"] / 1e6
        room.bar_label(room.bar(number, tokens, 0.8, color=COLOURS[name]), fmt="%.2f", fontsize="small")
    time.set_xticks(range(len(shapes)), [f"{batch} × {context:,}" for batch, context in shapes])
    time.set(xlabel="requests × tokens of each", ylabel="decode step (ms)")
    time.legend(frameon=False)
    room.set_xticks(range(len(LABELS)), LABELS)
    room.set(ylabel="tokens that fit (millions)")
    for axes in (time, room):
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(y=0.12)
    save(figure, "engine", ["engine.json"])


def kl_bytes(plt: Any) -> None:
    """Divergence against bytes, of every cache that was measured beside ours."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axes, (model, name) in zip(panels, MODELS.items(), strict=True):
        families = of_model(name)["families"]
        for family, (colour, marker, label) in FAMILIES.items():
            if family not in families:
                continue
            caches = families[family]["caches"]
            plain = caches["DynamicCache"]["bytes_per_token"]
            # Mixed widths lie beside the line of equal ones.
            points = sorted(
                (100 * score["bytes_per_token"] / plain, score["mean_kl"], " k" in cache.partition(",")[0])
                for cache, score in caches.items()
                if score.get("mean_kl") and score["mean_kl"] < LARGEST_KL
            )
            line = [point for point in points if not point[2]]
            axes.plot([x for x, _, _ in line], [y for _, y, _ in line], color=colour, marker=marker, label=label)
            mixed = [point for point in points if point[2]]
            axes.plot([x for x, _, _ in mixed], [y for _, y, _ in mixed], color=colour, marker=marker, linestyle="")
        axes.set(title=model, xlabel="bytes per token, % of bf16", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("mean KL per token (nats)")
    panels[0].legend(frameon=False, fontsize="small")
    save(figure, "kl_bytes", [f"side_by_side_{name}.json" for name in MODELS.values()])


def main() -> None:
    """Draw both."""
    mpl.use("svg")
    mpl.rcParams |= {"svg.hashsalt": "turboquant", "svg.fonttype": "none", "font.family": "sans-serif"}
    from matplotlib import pyplot as plt

    engine(plt)
    kl_bytes(plt)


if __name__ == "__main__":
    main()
