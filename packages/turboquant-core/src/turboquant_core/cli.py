"""The `turboquant` command as it is installed."""

import sys

from turboquant_core import interrupts


def main() -> None:
    """Run the command line with the subcommands of every installed package."""
    interrupts.end_at_once()
    try:
        # Even this import takes long enough to be interrupted.
        from turboquant_core.commands import app
    except ModuleNotFoundError as error:
        from turboquant_core.command_output import FAILED, how_to_install

        sys.stderr.write(f"error: turboquant needs {error.name}, which is not installed. {how_to_install()}\n")
        sys.exit(FAILED)
    app()
