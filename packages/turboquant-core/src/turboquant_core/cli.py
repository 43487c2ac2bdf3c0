"""The `turboquant` command; its subcommands come from the installed packages."""

import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from turboquant_core import __version__

COMMANDS_GROUP = "turboquant.commands"

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="KV-cache compression for LLM inference. Subcommands come with turboquant-hf.",
)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"turboquant-core {__version__}")
        raise typer.Exit


@app.callback()
def turboquant(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """KV-cache compression for LLM inference. Subcommands come with turboquant-hf."""


def main() -> None:
    """Run the command line with the subcommands of every installed package."""
    installed = entry_points(group=COMMANDS_GROUP)
    if not installed and sys.argv[1:2] not in (["--help"], ["--version"]):
        typer.echo("No subcommand is installed: they come with turboquant-hf.", err=True)
    for entry_point in installed:
        try:
            command = entry_point.load()
        except ImportError as error:
            typer.echo(f"{entry_point.name} is not available: {entry_point.value}: {error}", err=True)
        else:
            app.command(entry_point.name)(command)
    app()
