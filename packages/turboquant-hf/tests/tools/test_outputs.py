"""What becomes of files that others write where a command is to write."""

import pytest
from typer.testing import CliRunner

from turboquant_core.commands import app
from turboquant_hf.tools.demo import comparison

FEW = {
    "calibrate": ("--tokens", "300"),
    "demo": (),
    "eval": ("--measure", "quality", "--cache", "tq4", "--tokens", "384"),
    "tune": ("--tokens", "512", "--held-out-tokens", "512"),
}


@pytest.mark.parametrize(
    ("command", "option"),
    [("calibrate", "--out"), ("tune", "--out"), *((command, "--json") for command in FEW)],
    ids="".join,
)
def test_a_file_that_appears_while_a_command_works_is_not_replaced(
    meanwhile, tiny_model_folder, tmp_path, monkeypatch, said, command, option
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "result"
    meanwhile(lambda: path.write_text("theirs"))
    # It takes its time, and what it finds is not looked at.
    monkeypatch.setattr(comparison, "run_demo", lambda *args, **kwargs: None)
    arguments = [command, str(tiny_model_folder), option, str(path), *FEW[command], "--device", "cpu"]
    outcome = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert outcome.exit_code == 2, outcome.output
    assert "is there, and this command did not write it" in said(outcome)
    assert path.read_text() == "theirs"
