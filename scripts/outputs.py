"""What the commands print for a file of benchmarks/results/, as blocks of a page."""

import json
import textwrap
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console

from turboquant_hf.tools.eval.render import render
from turboquant_hf.tools.eval.settings import EVAL
from turboquant_hf.tools.eval.summary import summarise
from turboquant_hf.tools.report.model_card import model_card
from turboquant_hf.tools.run_files.run_file import read_run_file
from turboquant_hf.tools.tune import render as tune_render
from turboquant_hf.tools.tune.results import HeldOut
from turboquant_hf.tools.tune.search import TUNED, Choice, Tuned

WIDTH = 100


def evaluation(path: Path) -> str:
    """`turboquant eval` and its tables, for its run file."""
    summary = summarise(read_run_file(path, EVAL))
    console = Console(file=StringIO(), width=WIDTH)
    render(summary, console)
    return _block(summary.run.header["command"], console)


def tuning(path: Path) -> str:
    """`turboquant tune` and its tables, for what it wrote to `--json`."""
    found = json.loads(path.read_text(encoding="utf-8"))
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


def card_table(path: Path) -> str:
    """The table of the model card of a run file."""
    card = model_card([summarise(read_run_file(path, EVAL))])
    return "\n\n" + "\n".join(line for line in card.splitlines() if line.startswith("|")) + "\n\n"


def _block(command: str, console: Console) -> str:
    lines = textwrap.wrap(command, WIDTH + 10, break_long_words=False, break_on_hyphens=False)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n\n```text\n$ " + " \\\n    ".join(lines) + f"\n{printed.rstrip()}\n```\n\n"
