"""No arguments and no files make a command do anything but say what is wrong: no model is loaded here."""

import json
import time
from importlib.metadata import entry_points

import pytest
import torch
import typer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import Gemma3TextConfig, LlamaConfig, Qwen3NextConfig
from typer.testing import CliRunner

from turboquant_core.commands import app
from turboquant_hf.tools.models import MAX_LAYERS

COMMANDS = {found.name: found for found in entry_points(group="turboquant.commands")}
# What no model or file has for a name.
NAMES = ("", "-", "[/x]", ":smile:", "no/such-model", "a b", "x" * 300, "missing/", "\x1b[31m", "\udcff", "%s", "..")
NUMBERS = ("0", "1", "-1", "2", "80", "inf", "-inf", "nan", "1e308", "1e-308", "-0", "9" * 400, "9" * 5000, "1_0", "x")
FILES = {
    "notes.md": b"notes",
    "damaged.json": b'{"format": "turboquant eval", "version": 1, "settings": {}, "results": []}',
    "deep.json": b"[" * 200_000,
    "latin1.txt": b"\xe9\xff",
}
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
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("name", sorted(COMMANDS))
@QUICK
@given(data=st.data())
def test_no_arguments_end_a_command_otherwise(folder, name, monkeypatch, data):
    monkeypatch.chdir(folder)
    # Nothing that would be loaded.
    monkeypatch.setattr("turboquant_hf.tools.inputs.default_model", lambda: "no/such-model")
    monkeypatch.setattr("turboquant_hf.tools.doctor.inputs.default_model", lambda: "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    words = st.sampled_from([*NAMES, *NUMBERS, "model", "model/x", *FILES])
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


CONFIGS = {
    "llama": LlamaConfig(num_hidden_layers=2),
    "gemma3": Gemma3TextConfig(num_hidden_layers=6),
    "qwen3next": Qwen3NextConfig(num_hidden_layers=4),
}


@settings(QUICK, max_examples=100)
@given(name=st.sampled_from(sorted(CONFIGS)), command=st.sampled_from(["doctor", "plan"]), data=st.data())
def test_no_configuration_ends_a_command_otherwise(tmp_path, name, command, data):
    config = CONFIGS[name].to_dict()
    for field in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[field] = data.draw(st.sampled_from(ABSURD))
    (tmp_path / "config.json").write_text(json.dumps(config))
    call(command, tmp_path, "--json", "-", *(["--kv-memory", 10] if command == "plan" else ["--memory", 80]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 0),
        ("num_attention_heads", "two"),
        ("num_attention_heads", None),
        ("num_key_value_heads", -3),
        ("head_dim", 10**30),
        ("max_position_embeddings", -3),
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", -3),
    ],
)
@pytest.mark.parametrize("command", [("doctor",), ("plan", "--kv-memory", 10)])
def test_sizes_of_no_model_are_refused(tmp_path, command, field, value):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"].to_dict() | {field: value}))
    outcome = call(*command, tmp_path)
    assert outcome.exit_code in (1, 2)
    assert outcome.stderr.startswith(("error: cannot read", "refused: "))


@pytest.mark.parametrize("command", [("doctor",), ("plan", "--kv-memory", 10)])
def test_as_many_layers_as_are_read_are_answered(tmp_path, command):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["llama"].to_dict() | {"num_hidden_layers": MAX_LAYERS}))
    start = time.process_time()
    assert call(*command, tmp_path).exit_code == 0
    assert time.process_time() - start < 5


@pytest.mark.parametrize(("largest", "status"), [(1e38, 0), (float("inf"), 2), (float("nan"), 2)])
def test_key_biases_that_are_absurd(tmp_path, largest, status):
    CONFIGS["llama"].save_pretrained(tmp_path)
    bias = torch.full((CONFIGS["llama"].hidden_size,), largest)
    save_file({"model.layers.0.self_attn.k_proj.bias": bias}, tmp_path / "model.safetensors")
    assert call("doctor", tmp_path, "--json", "-").exit_code == status


@pytest.mark.parametrize("name", ["calibrate", "eval", "tune", "demo"])
@pytest.mark.parametrize("device", ["meta", "cuda:99", "warp", "cpu:x"])
def test_devices_that_run_nothing(name, device):
    outcome = call(name, "no/such-model", "--device", device)
    assert outcome.exit_code == 2
    assert f"there is no device {device} to run a model on" in outcome.stderr


def test_a_name_with_markup_is_shown_as_it_is(tmp_path):
    folder = tmp_path / "[red]a[/x]:smile:"
    CONFIGS["llama"].save_pretrained(folder)
    for arguments in (("doctor", folder), ("plan", folder, "--kv-memory", 10)):
        assert "x]:smile::" in "".join(call(*arguments).stdout.split())
