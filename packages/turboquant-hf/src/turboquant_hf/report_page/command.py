"""The command line of `turboquant report`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from turboquant_hf.command_line import check_target, fail
from turboquant_hf.eval.run_file import read_run_file
from turboquant_hf.eval.summary import RunSummary, summarise
from turboquant_hf.json_output import STDOUT, JsonOption, check_json_target, write_json
from turboquant_hf.report_page.model_card import model_card
from turboquant_hf.report_page.page import render_page


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN.json...", help="Run files of turboquant eval.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("turboquant-report.html"),
    card: Annotated[
        Path | None, typer.Option("--model-card", help="Write a part of a model card to this Markdown file.")
    ] = None,
    json_target: JsonOption = None,
) -> None:
    """Make a page of what turboquant eval measured: one HTML file that needs no network.

    Exit status: 0 with a page, 1 with a page of runs that are not finished, 2 for what cannot be read or written.
    """
    console, errors = Console(), Console(stderr=True)
    for path in (out, *([card] if card is not None else [])):
        check_target(path, errors)
    check_json_target(json_target, errors)
    summaries = [_read(path, errors) for path in runs]
    out.write_text(render_page(summaries), encoding="utf-8")
    if card is not None:
        card.write_text(model_card(summaries), encoding="utf-8")
    if json_target is not None:
        write_json({"runs": [summary.to_dict() for summary in summaries]}, json_target)
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


def _read(path: Path, errors: Console) -> RunSummary:
    try:
        return summarise(read_run_file(path))
    except FileNotFoundError:
        fail(errors, f"there is no run file {path}; turboquant eval writes one")
    except (OSError, ValueError) as error:
        fail(errors, str(error))
