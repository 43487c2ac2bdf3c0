import json

import pytest
import torch
from typer.testing import CliRunner

from turboquant_core.commands import app

SMALL = (
    *("--cache", "tq4", "--cache", "k8v4", "--tokens", "384", "--needle-length", "128", "--needle-depths", "2"),
    *("--greedy-tokens", "6", "--device", "cpu"),
)


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """On tensors as small as these a second thread does nothing but wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def run_eval():
    """Runs the command, by default small."""

    def run(*arguments, small=True):
        options = [str(argument) for argument in ((*SMALL, *arguments) if small else arguments)]
        return CliRunner().invoke(app, ["eval", *options], env={"COLUMNS": "160"})

    return run


@pytest.fixture(scope="session")
def finished(run_eval, tiny_model_folder, tmp_path_factory):
    """A finished run file, and what the command said."""
    path = tmp_path_factory.mktemp("eval") / "run.json"
    outcome = run_eval(tiny_model_folder, "--out", path)
    assert outcome.exit_code == 0, outcome.output
    return path, outcome.output


@pytest.fixture
def continued(finished, tmp_path):
    """A run file of the same settings that lacks the results whose names do not satisfy a condition."""

    def make(is_there):
        data = json.loads(finished[0].read_text())
        data["results"] = {name: result for name, result in data["results"].items() if is_there(name)}
        path = tmp_path / "run.json"
        path.write_text(json.dumps(data))
        return path

    return make


@pytest.fixture(scope="session")
def said():
    return lambda outcome: " ".join(outcome.output.split())
