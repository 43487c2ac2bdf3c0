"""The `turboquant` command as it is installed."""

from turboquant_core import interrupts


def main() -> None:
    """Run the command line with the subcommands of every installed package."""
    interrupts.end_at_once()
    # Even this import takes long enough to be interrupted.
    from turboquant_core.commands import app

    app()
