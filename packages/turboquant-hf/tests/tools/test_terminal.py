from io import StringIO

import pytest
from rich.console import Console

from turboquant_hf.tools import terminal
from turboquant_hf.tools.terminal import Steps


@pytest.fixture
def said():
    """What is said of three steps."""

    def run(**options):
        console = Console(file=StringIO(), width=80, **options)
        with Steps(console, "measuring", 3) as steps:
            for name in ("keys", "values", "[/x]"):
                steps.begin(name)
                steps.done()
        return console.file.getvalue().splitlines()

    return run


def test_without_a_terminal_lines_say_how_far_it_is(said, monkeypatch):
    assert said() == ["measuring: 0 of 3"]
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0)
    lines = said(markup=False)
    assert lines[0] == "measuring: 0 of 3"
    assert lines[-2:] == ["[/x]: 2 of 3", "[/x]: 3 of 3"]


def test_on_a_terminal_there_is_a_bar_and_no_line(said, monkeypatch):
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0)
    assert not any(" of 3" in line for line in said(force_terminal=True, markup=False))
