import json
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from transformers import BertConfig
from typer.testing import CliRunner

from turboquant_core.commands import app
from turboquant_hf.tools.demo.command import demo
from turboquant_hf.tools.demo.comparison import COMPARED, encode_long_prompt, num_steps, run_demo
from turboquant_hf.tools.models import load_model


def run(*arguments):
    return CliRunner().invoke(app, ["demo", *map(str, arguments)], env={"COLUMNS": "160"})


@pytest.fixture(scope="module")
def result(tiny_model_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "demo.json"
    outcome = run(tiny_model_folder, "--json", path, "--device", "cpu")
    assert outcome.exit_code == 0, outcome.output
    return outcome.output, json.loads(path.read_text())


def test_core_finds_the_command():
    (entry_point,) = entry_points(group="turboquant.commands", name="demo")
    assert entry_point.load() is demo


def test_json_holds_every_cache_and_figure(result):
    _, data = result
    assert [run["cache"] for run in data["runs"]] == list(COMPARED)
    assert data["long_prompt_tokens"] > 2000
    for run in data["runs"]:
        assert run["num_tokens"] > 2000
        assert run["tokens_per_second"] > 0
        assert run["bytes_per_token"] > 0
        assert run["chat_answer"]
        assert run["long_answer"]
    reference, *compressed = data["runs"]
    assert reference["mean_kl"] == 0
    assert reference["bytes_per_token"] == 2 * 2 * 2 * 64 * 4
    assert reference["compression"] == 0.5
    # Eighteen slots in float32 take as much as 36 tokens in bfloat16.
    kept = 36 / data["long_prompt_tokens"]
    expected = [1 / (1 / compression + kept) for compression in (3.76, 3.05, 4.92, 7.11)]
    # Less than that: a page is started, and there is room for one more in thirty-two.
    assert [run["compression"] for run in compressed] == pytest.approx(expected, rel=0.04)


def test_tables_show_answers_and_figures(result):
    output, data = result
    assert "generating and scoring: 0 of " in output
    for run in data["runs"]:
        assert f"{run['bytes_per_token']:,.0f}" in output
        assert f"{run['tokens_per_second']:.1f}" in output
    assert f"{data['runs'][1]['mean_kl']:.4f}" in output


def test_progress_ends_where_it_says(tiny_model_folder):
    loaded = load_model(str(tiny_model_folder), "cpu")
    long_ids = encode_long_prompt(loaded)[:, :600]
    steps = []
    run_demo(loaded, long_ids, on_step=lambda: steps.append(1))
    assert len(steps) == num_steps(600)


def test_json_alone(result, tiny_model_folder, monkeypatch):
    _, data = result

    class Done:
        def to_dict(self):
            return data

    monkeypatch.setattr("turboquant_hf.tools.demo.comparison.run_demo", lambda *arguments, **options: Done())
    assert json.loads(run(tiny_model_folder, "--json", "-", "--device", "cpu").stdout) == data


def test_a_model_it_cannot_serve_is_refused_before_weights_are_read(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    outcome = run(tmp_path)
    assert outcome.exit_code == 2
    assert "cannot use " in outcome.output
    assert "is an encoder, which keeps no KV cache" in " ".join(outcome.output.split())


@pytest.mark.parametrize("name", ["no/such-model", "missing.gguf", "no-such-folder/"])
def test_a_model_that_is_not_there(name):
    outcome = run(name)
    assert outcome.exit_code == 2
    assert f"cannot load {name}" in outcome.output
    assert ". Pass MODEL" in " ".join(outcome.output.split())


def test_a_context_that_is_too_short(tiny_model, tiny_model_folder, tmp_path):
    for file in Path(tiny_model_folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    outcome = run(tmp_path)
    assert outcome.exit_code == 2
    assert "takes 512 tokens and the demo's long prompt has" in " ".join(outcome.output.split())


def test_json_into_a_folder_that_is_not_there(tmp_path):
    outcome = run("--json", tmp_path / "none" / "demo.json")
    assert outcome.exit_code == 2
    assert "there is no folder" in outcome.output
