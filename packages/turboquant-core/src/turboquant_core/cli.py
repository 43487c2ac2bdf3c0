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
        from turboquant_core.command_output import FAILED

        said = f"turboquant needs {error.name}, which is not installed. Install turboquant-hf[tools], which brings it."
        sys.stderr.write(f"error: {said}\n")
        sys.exit(FAILED)
    app()
