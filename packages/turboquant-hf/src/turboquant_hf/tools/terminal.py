"""Where the commands write, and how they say how far they are."""

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

SECONDS_BETWEEN_LINES = 10.0


def consoles() -> tuple[Console, Console]:
    """The output and the errors, in which names are shown as they are."""
    return Console(markup=False, emoji=False), Console(markup=False, emoji=False, stderr=True)


class Steps:
    """The steps of a long work: a bar that is gone in the end, or without a terminal a line now and then.

    Args:
        errors: Where they are shown.
        name: What is done.
        total: How many there are.
    """

    def __init__(self, errors: Console, name: str, total: int) -> None:
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            *columns,
            TimeElapsedColumn(),
            console=errors,
            transient=True,
            disable=not errors.is_terminal,
            # As often as its clock moves: a notebook's `!` is a terminal too, and keeps every drawing.
            refresh_per_second=1,
        )
        self._task = self._bar.add_task(name, total=total)
        self._next_line = 0.0

    def __enter__(self) -> Self:
        self._bar.start()
        self._say()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, name: str) -> None:
        """Say what the next step is."""
        self._bar.update(self._task, description=name)
        self._say()

    def done(self) -> None:
        """Count a step."""
        self._bar.advance(self._task)
        self._say()

    def _say(self) -> None:
        now = time.monotonic()
        if not self._bar.disable or now < self._next_line:
            return
        self._next_line = now + SECONDS_BETWEEN_LINES
        (task,) = self._bar.tasks
        self._bar.console.print(f"{task.description}: {task.completed:.0f} of {task.total:.0f}", highlight=False)
