import sys
from importlib.metadata import distribution
from typing import Annotated

import pytest
import typer

from turboquant_core import __version__, cli


class FakeEntryPoint:
    def __init__(self, name, command):
        self.name = name
        self.value = f"a_package.{name}"
        self._command = command

    def load(self):
        if isinstance(self._command, Exception):
            raise self._command
        return self._command


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line with the given installed commands: exit status, output, errors."""

    def run(*args, **commands):
        def entry_points(group):
            assert group == "turboquant.commands"
            return [FakeEntryPoint(name, command) for name, command in commands.items()]

        monkeypatch.setattr(cli, "entry_points", entry_points)
        monkeypatch.setattr(cli.app, "registered_commands", [])
        monkeypatch.setattr(sys, "argv", ["turboquant", *args])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code or 0, *capsys.readouterr()

    return run


def greet(name: str, times: Annotated[int, typer.Option(help="How often.")] = 1) -> None:
    """Say hello."""
    for _ in range(times):
        typer.echo(f"hello {name}")


def part(name: str) -> None:
    """Say goodbye."""
    typer.echo(f"goodbye {name}")


def test_version(run):
    assert run("--version") == (0, f"turboquant-core {__version__}\n", "")


def test_version_needs_no_command_and_runs_none(run):
    assert run("--version", "greet", "you", greet=greet)[1] == f"turboquant-core {__version__}\n"


def test_no_arguments_show_the_help(run):
    _, output, errors = run(greet=greet, part=part)
    text = output + errors
    assert "turboquant [OPTIONS] COMMAND [ARGS]..." in text
    assert "--version" in text
    assert "greet" in text
    assert "Say goodbye." in text


def test_help_without_any_command_installed(run):
    status, output, _ = run("--help")
    assert status == 0
    assert "turboquant-hf" in output


def test_subcommands_are_those_of_the_installed_packages(run):
    assert run("greet", "you", "--times", "2", greet=greet, part=part) == (
        0,
        "hello you\nhello you\n",
        "",
    )
    assert run("part", "you", greet=greet, part=part)[1] == "goodbye you\n"


def test_a_single_subcommand_keeps_its_name(run):
    assert run("greet", "you", greet=greet)[1] == "hello you\n"


def test_an_unknown_subcommand_is_refused(run):
    status, _, errors = run("sing", greet=greet)
    assert status == 2
    assert "No such command 'sing'" in errors


def test_without_any_command_installed_the_package_that_brings_them_is_named(run):
    status, _, errors = run("doctor", "MODEL", "--json", "-")
    assert status == 2
    assert "they come with turboquant-hf" in errors
    assert run("--version")[2] == ""


def test_a_command_that_cannot_be_imported_is_named_and_does_not_stop_the_others(run):
    missing = ImportError("No module named 'gguf'")
    status, output, errors = run("greet", "you", demo=missing, greet=greet)
    assert (status, output) == (0, "hello you\n")
    assert "demo is not available: a_package.demo: No module named 'gguf'" in errors


def test_the_installed_script_is_this_command():
    scripts = distribution("turboquant-core").entry_points.select(group="console_scripts")
    assert [(script.name, script.load()) for script in scripts] == [("turboquant", cli.main)]
