"""What `--json` of every command does."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from turboquant_hf.command_line import check_target

STDOUT = "-"

JsonOption = Annotated[
    str | None, typer.Option("--json", help="Write what was found to this file too; - for the output, alone.")
]


def check_json_target(target: str | None, errors: Console) -> None:
    """End the command if the file cannot be written."""
    if target not in (None, STDOUT):
        check_target(Path(str(target)), errors)


def write_json(data: dict[str, Any], target: str) -> None:
    """Write to a file, or to the standard output."""
    text = json.dumps(data, indent=2) + "\n"
    if target == STDOUT:
        typer.echo(text, nl=False)
    else:
        Path(target).write_text(text, encoding="utf-8")
