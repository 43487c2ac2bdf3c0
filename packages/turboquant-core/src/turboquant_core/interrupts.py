"""Ctrl-C: what it does while a command is imported, and while it works."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

INTERRUPTED = 130


def end_at_once() -> None:
    """Have Ctrl-C end the process with status 130 and without a word, wherever it is.

    For imports, which may catch KeyboardInterrupt or make another error of it, and have nothing to put in order.
    """
    signal.signal(signal.SIGINT, _end)


@contextmanager
def raised() -> Iterator[None]:
    """Have Ctrl-C raise KeyboardInterrupt for a while, if it would end the process at once."""
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        end_at_once()


def is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is KeyboardInterrupt, or what somebody made of one."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _end(*_: object) -> NoReturn:
    os._exit(INTERRUPTED)
