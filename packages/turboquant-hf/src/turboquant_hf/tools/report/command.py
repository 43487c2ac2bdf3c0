"""The command line of `turboquant report`."""

from pathlib import Path
from typing import Annotated

import typer

from turboquant_core.command_options import ForceOption, JsonOption
from turboquant_core.command_output import STDOUT, CommandError, Output, check_outputs, json_output, write_json
from turboquant_core.files import write_atomically
from turboquant_hf.tools.eval.settings import EVAL
from turboquant_hf.tools.eval.summary import RunSummary, summarise
from turboquant_hf.tools.report.model_card import MARKER as CARD_MARKER
from turboquant_hf.tools.report.model_card import model_card
from turboquant_hf.tools.report.page import MARKER as PAGE_MARKER
from turboquant_hf.tools.report.page import render_page
from turboquant_hf.tools.run_files.run_file import read_run_file
from turboquant_hf.tools.terminal import consoles


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN.json...", help="Run files of turboquant eval.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("turboquant-report.html"),
    card: Annotated[
        Path | None, typer.Option("--model-card", help="Write a part of a model card to this Markdown file.")
    ] = None,
    json_target: JsonOption = None,
    force: ForceOption = False,
) -> None:
    """Make a page of what turboquant eval measured: one HTML file that needs no network.

    Exit status: 0 with a page, 1 with a page of runs that are not finished, 2 for what cannot be read or written.
    """
    console, errors = consoles()
    outputs = [
        Output("--out", out, PAGE_MARKER),
        Output("--model-card", card, CARD_MARKER),
        json_output("report", json_target),
    ]
    check_outputs(outputs, {f"RUN.json {path}": path for path in runs}, force=force)
    summaries = [_read(path) for path in runs]
    write_atomically(out, render_page(summaries))
    if card is not None:
        write_atomically(card, model_card(summaries))
    if json_target is not None:
        write_json("report", {"runs": [summary.to_dict() for summary in summaries]}, json_target)
    if json_target != STDOUT:
        for path in (out, *([card] if card is not None else [])):
            console.print(f"{path}: {len(summaries)} run{'s' if len(summaries) > 1 else ''}", highlight=False)
    unfinished = [summary for summary in summaries if summary.num_missing]
    for summary in unfinished:
        errors.print(
            f"{summary.run.path} is not finished: {summary.num_missing} measurements are missing. The command that "
            "made it goes on from there.",
            highlight=False,
        )
    if unfinished:
        raise typer.Exit(1)


def _read(path: Path) -> RunSummary:
    try:
        return summarise(read_run_file(path, EVAL))
    except FileNotFoundError:
        raise CommandError(f"there is no run file {path}; turboquant eval writes one") from None
    except (OSError, ValueError) as error:
        raise CommandError(str(error)) from error
