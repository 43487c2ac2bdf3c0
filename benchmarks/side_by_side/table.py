"""The results of eval_side_by_side.py as tables, and single figures of them."""

from collections.abc import Callable, Mapping
from typing import Any

from figure_text import nats, percent, perplexity, table
from results_file import read_result

REFERENCE = "DynamicCache"
PASSES = "passes"
COLUMNS = ("cache", "bytes / token", "against bf16", "mean KL", "p99 KL", "top-1", "perplexity")
SPEED = "decode, against DynamicCache"
# What is shown of both models, and the caches' names.
SHOWN_PRESETS = {"k8v4": "k8v4", "k6v4": "k6v4", "tq4": "4", "tq3": "3", "tq2": "2"}
PEERS = {
    "`tq4`": "turboquant 4",
    "`tq4`, with a calibration file": "turboquant 4, calibrated",
    "`k6v4`": "turboquant k6v4",
    "`tq4`, codes only": "turboquant 4, codes only",
    "`k6v4`, codes only": "turboquant k6v4, codes only",
    "quanto, 4 bits": "quanto 4",
    "quanto, 4 bits, keys by channel": "quanto 4, keys by channel",
    "hqq, 4 bits": "hqq 4",
    "hqq, 4 bits, keys by channel": "hqq 4, keys by channel",
    "fp8": "fp8",
}


def markdown(result: Mapping[str, Any]) -> str:
    """Figures of every cache, then what the first cache of each family passes."""
    return f"{figures(result)}\n\n{lifecycle(result)}"


def figures(result: Mapping[str, Any]) -> str:
    """A table of every cache's figures."""
    # Fewer tokens than a window do not show what emptying it costs.
    with_speed = result["decode_tokens"] >= result["chunk_size"]
    columns = (*COLUMNS, SPEED) if with_speed else COLUMNS
    rows = []
    for number, family in enumerate(result["families"].values()):
        uncompressed = family["caches"][REFERENCE]
        for name, row in family["caches"].items():
            if "fails" in row:
                rows.append([name, row["fails"], *[""] * (len(columns) - 2)])
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
            rows.append(cells)
    return table(columns, rows)


def lifecycle(result: Mapping[str, Any]) -> str:
    """A table of what the first cache of each family passes."""
    families = result["families"]
    measured = [
        next(((name, row) for name, row in family["caches"].items() if name != REFERENCE and "lifecycle" in row), None)
        for family in families.values()
    ]
    rows = {REFERENCE: next(iter(families.values()))["caches"][REFERENCE], **dict(filter(None, measured))}
    columns = list(rows[REFERENCE]["lifecycle"])
    lines = [[name, *(_outcome(row["lifecycle"][column]) for column in columns)] for name, row in rows.items()]
    return table(("cache", *columns), lines)


def presets(result: Mapping[str, Any]) -> str:
    """What every preset costs a model: with the first and newest tokens kept, calibrated too, and without."""
    kinds = {"first and newest tokens kept": "", "the same, calibrated": ", calibrated", "codes only": ", codes only"}
    known = scores(result)
    columns = ["preset"]
    for kind in kinds:
        columns += [f"{kind}: KL (nats)", "top-1", "perplexity"]
    rows = []
    for preset, label in SHOWN_PRESETS.items():
        cells = [f"`{preset}`"]
        for suffix in kinds.values():
            score = known.get(f"turboquant {label}{suffix}")
            if score is None:
                cells += ["–"] * 3
            else:
                cells += [nats(score["mean_kl"]), percent(score["top1_agreement"]), perplexity(score)]
        rows.append(cells)
    return table(columns, rows)


def peers() -> str:
    """The caches of transformers on both models, where ours is at 4 bits."""
    models = [scores(of_model(model)) for model in ("smollm2", "qwen2.5-coder-1.5b")]
    rows = []
    for label, name in PEERS.items():
        cells = [label]
        for known in models:
            score = known.get(name)
            cells += [f"{score['bytes_per_token']:,.0f}", nats(score["mean_kl"])] if score else ["–"] * 2
        rows.append(cells)
    columns = ("cache", "SmolLM2-135M: bytes / token", "KL (nats)", "Qwen2.5-Coder-1.5B: bytes / token", "KL (nats)")
    return table(columns, rows)


def of_cache(name: str) -> str:
    """A figure KIND:MODEL:CACHE, _ for blanks.

    KIND is "kl", "bytes", "ppl", by how many per cent the perplexity is above DynamicCache's, or "fewer", by how many
    per cent a token takes fewer bytes than in the cache that follows after another colon.
    """
    kind, model, *caches = name.replace("_", " ").split(":")
    known = scores(of_model(model))
    score, other = known[caches[0]], known[caches[-1] if kind == "fewer" else REFERENCE]
    figures_of_kind = {
        "kl": nats(score["mean_kl"]),
        "bytes": f"{score['bytes_per_token']:,.0f}",
        "ppl": f"{100 * (score['perplexity'] / other['perplexity'] - 1):.1f}",
        "fewer": f"{100 * (1 - score['bytes_per_token'] / other['bytes_per_token']):.0f}",
    }
    return figures_of_kind[kind]


def of_model(model: str) -> Any:
    """The results of a model."""
    return read_result(f"side_by_side_{model}")


def scores(result: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of all families, by cache."""
    return {name: score for family in result["families"].values() for name, score in family["caches"].items()}


def _outcome(outcome: str) -> str:
    return "yes" if outcome == PASSES else outcome


FIGURES: dict[str, Callable[[], str]] = {
    "presets-64": lambda: presets(of_model("smollm2")),
    "presets-128": lambda: presets(of_model("qwen2.5-coder-1.5b")),
    "peers": peers,
    "caches-64": lambda: figures(of_model("smollm2")),
    "caches-128": lambda: figures(of_model("qwen2.5-coder-1.5b")),
    "lifecycle": lambda: lifecycle(of_model("smollm2")),
}
