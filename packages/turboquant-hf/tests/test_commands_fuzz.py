"""No arguments and no files make a command do anything but say what is wrong: no model is loaded here."""

import json
from importlib.metadata import entry_points

import pytest
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from typer.testing import CliRunner

from turboquant_core.commands import app

COMMANDS = {found.name: found for found in entry_points(group="turboquant.commands")}
# What no model or file has for a name.
NAMES = (
    "",
    "-",
    "[/x]",
    ":smile:",
    "no/such-model",
    "a b",
    "x" * 300,
    "missing/",
    "\x1b[31m",
    "\udcff",
    "%s",
    "~",
    "..",
)
NUMBERS = ("0", "1", "-1", "2", "80", "inf", "-inf", "nan", "1e308", "1e-308", "-0", "9" * 400, "9" * 5000, "1_0", "x")
ABSURD = (None, 0, -3, 1.5, "two", 1e308, 10**30, [], {}, True, float("nan"), [None], "\ud800", 2**31)

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def check(outcome, arguments):
    """What holds however a command was called."""
    assert outcome.exit_code in (0, 1, 2, 130), (arguments, outcome.exception)
    for said in ("Traceback", "bug: "):
        assert said not in outcome.output, (arguments, outcome.output)
    if "--json" in arguments and "--help" not in arguments and arguments[arguments.index("--json") + 1 :][:1] == ["-"]:
        data = json.loads(outcome.stdout, parse_constant=refuse_constant)
        assert isinstance(data, dict)
        assert outcome.exit_code == 0 or data.get("error") or len(data) > 2, (arguments, data)


def call(name, *arguments):
    arguments = [name, *map(str, arguments)]
    outcome = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    check(outcome, arguments)
    return outcome


def options_of(name):
    """Every option of a command, and whether a value follows it."""
    alone = typer.Typer()
    alone.command()(COMMANDS[name].load())
    parameters = typer.main.get_command(alone).params
    found = [(option, getattr(each, "is_flag", False)) for each in parameters for option in each.opts]
    return [(option, is_flag) for option, is_flag in found if option.startswith("--") and option != "--json"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to work in, with a model that has no weights, and files that are something else."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "model").mkdir()
    LlamaConfig(num_hidden_layers=2).save_pretrained(folder / "model")
    (folder / "notes.md").write_text("notes")
    (folder / "damaged.json").write_text('{"format": "turboquant eval", "version": 1, "settings": {}, "results": []}')
    (folder / "deep.json").write_text("[" * 200_000)
    (folder / "latin1.txt").write_bytes(b"\xe9\xff")
    return folder


@pytest.mark.parametrize("name", sorted(COMMANDS))
@QUICK
@given(data=st.data())
def test_no_arguments_end_a_command_otherwise(folder, name, monkeypatch, data):
    monkeypatch.chdir(folder)
    # Nothing that would be loaded.
    monkeypatch.setattr("turboquant_hf.command_line.default_model", lambda: "no/such-model")
    monkeypatch.setattr("turboquant_hf.doctor.command_line.default_model", lambda: "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    words = st.sampled_from(
        [*NAMES, *NUMBERS, "model", "notes.md", "damaged.json", "deep.json", "latin1.txt", "model/x"]
    )
    words |= st.text(st.characters(blacklist_characters="\0"), max_size=8)
    option = st.sampled_from(options_of(name)).flatmap(
        lambda option: st.just([option[0]]) if option[1] else words.map(lambda word: [option[0], word])
    )
    pieces = data.draw(st.lists(option | words.map(lambda word: [word]), max_size=5))
    if data.draw(st.booleans()):
        pieces.insert(data.draw(st.integers(0, len(pieces))), ["--json", "-"])
    arguments = [word for piece in pieces for word in piece]
    call(name, *arguments)
    for file, content in before.items():
        assert (folder / file).read_bytes() == content, (name, arguments)
    for path in folder.iterdir():
        if path.name not in before and path.is_file():
            path.unlink()
