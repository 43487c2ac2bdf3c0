"""What the commands wrote to benchmarks/results/, as tables and as they print it."""

import re
import textwrap
from collections.abc import Callable
from dataclasses import fields
from io import StringIO
from typing import Any

from rich.console import Console

from figure_text import bold_if, nats, percent, perplexity, table
from results_file import RESULTS, read_result
from turboquant_hf.tools.eval.render import render
from turboquant_hf.tools.eval.settings import EVAL
from turboquant_hf.tools.eval.summary import RunSummary, summarise
from turboquant_hf.tools.report.model_card import model_card
from turboquant_hf.tools.run_files.run_file import read_run_file
from turboquant_hf.tools.tune import render as tune_render
from turboquant_hf.tools.tune.results import HeldOut
from turboquant_hf.tools.tune.search import TUNED, Choice, Tuned

WIDTH = 100


def demo() -> str:
    """SmolLM2 in every cache of the demo, the uncompressed one as bf16 would be."""
    runs = {run["cache"]: run for run in read_result("demo")["runs"]}
    plain = runs.pop("uncompressed")
    nbytes = f"{plain['bytes_per_token'] / 2:,.0f}"
    rows = [["uncompressed, bf16", nbytes, "1.00x", "0", "0", "100 %", perplexity(plain)]]
    for name in sorted(runs, key=lambda name: -float(runs[name]["bytes_per_token"])):
        run = runs[name]
        rows.append(
            [
                f"`{name}`{' (default)' if name == 'tq4' else ''}",
                f"{run['bytes_per_token']:,.0f}",
                f"{run['compression']:.2f}x",
                nats(run["mean_kl"]),
                nats(run["p99_kl"]),
                percent(run["top1_agreement"]),
                perplexity(run),
            ]
        )
    columns = ("cache", "bytes per token", "against bf16", "mean KL (nats)", "p99 KL", "top-1 agreement", "perplexity")
    return table(columns, rows)


def demo_speed() -> str:
    """Tokens per second on a CPU: compressed caches against the uncompressed one."""
    rates = {run["cache"]: float(run["tokens_per_second"]) for run in read_result("demo")["runs"]}
    plain = rates.pop("uncompressed")
    return f"{min(rates.values()):.1f} to {max(rates.values()):.1f} tokens/s against {plain:.1f}"


def demo_seconds() -> str:
    """Seconds that the demo takes on a CPU."""
    return f"{read_result('demo')['seconds']:.0f}"


def evaluation() -> str:
    """`turboquant eval` and its tables."""
    summary = _evaluated()
    console = Console(file=StringIO(), width=WIDTH)
    render(summary, console)
    return _block(summary.run.header["command"], console)


def card_table() -> str:
    """The table of the model card of `turboquant report`."""
    return "\n".join(line for line in model_card([_evaluated()]).splitlines() if line.startswith("|"))


def tuning() -> str:
    """`turboquant tune` and its tables."""
    found = read_result("tune_smollm2_3.5")
    layer_bits = {int(index): tuple(pair) for index, pair in found["layer_bits"].items()}

    def choice(row: dict[str, Any]) -> Choice:
        bits = layer_bits
        if row["bits"] != TUNED:
            key_bits, value_bits = map(float, row["bits"].split("/"))
            bits = dict.fromkeys(layer_bits, (key_bits, value_bits))
        scores = {field.name: row[field.name] for field in fields(HeldOut)}
        return Choice(row["bits"], bits, row["token_nbytes"], row["predicted_kl"], HeldOut.from_dict(scores))

    tuned, *uniform = map(choice, found["held_out"])
    console = Console(file=StringIO(), width=WIDTH)
    tuned_bits = Tuned(found["target_bits"], tuned, uniform)
    tune_render.render(tuned_bits, found["model"]["name"], found["held_out_tokens"], console)
    return _block(found["command"], console)


def tune_spread() -> str:
    """How many times as much 3 bits in the keys of one layer cost as in those of another."""
    units = read_result("tune_run_smollm2")["results"].items()
    costs = [layer["keys"] for name, layer in units if re.fullmatch(r"layer/\d+/3", name)]
    return f"{max(costs) / min(costs):.0f}"


def tune() -> str:
    """What bits that were chosen layer by layer give beside uniform ones."""
    rows = []
    for name, model in (("smollm2", "SmolLM2-135M"), ("qwen2.5-coder-1.5b", "Qwen2.5-Coder-1.5B")):
        files = [read_result(path.stem) for path in RESULTS.glob(f"tune_{name}_*.json")]
        for found in sorted(files, key=lambda found: float(found["target_bits"])):
            tuned, *uniform = found["held_out"]
            best = uniform[0]
            rows.append(
                [
                    model,
                    f"{found['target_bits']:g}",
                    f"{tuned['token_nbytes']:,}",
                    bold_if(found["is_better"], nats(tuned["mean_kl"])),
                    f"{nats(best['mean_kl'])} ({best['bits']})",
                    f"{tuned['mean_kl'] / best['mean_kl'] - 1:+.0%}",
                    f"{percent(tuned['top1_agreement'])}, {percent(best['top1_agreement'])}",
                ]
            )
    columns = ("model", "target", "bytes / token", "tuned: KL (nats)", "best uniform: KL (bits)", "", "top-1, both")
    return table(columns, rows)


def _evaluated() -> RunSummary:
    return summarise(read_run_file(RESULTS / "eval_smollm2.json", EVAL))


def _block(command: str, console: Console) -> str:
    lines = textwrap.wrap(command, WIDTH + 10, break_long_words=False, break_on_hyphens=False)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    return "```text\n$ " + " \\\n    ".join(lines) + f"\n{printed.rstrip()}\n```"


FIGURES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "demo-speed": demo_speed,
    "demo-seconds": demo_seconds,
    "eval": evaluation,
    "eval-card": card_table,
    "tune-output": tuning,
    "tune-spread": tune_spread,
    "tune": tune,
}
