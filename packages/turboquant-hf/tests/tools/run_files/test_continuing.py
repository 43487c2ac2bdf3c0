"""What a command does with a path at which it is to begin a run file."""

import json
import os
import stat

import pytest

from turboquant_hf.tools.run_files.run_file import read_run_file


@pytest.fixture(params=["eval", "tune"])
def command(request, run_eval, run_tune, tmp_path):
    """Runs a command with a run file, and whatever else it writes in a folder of its own."""
    (tmp_path / "other").mkdir()
    if request.param == "eval":
        return lambda model, path, *options: run_eval(model, "--out", path, "--measure", "quality", *options)
    return lambda model, path, *options: run_tune(
        model, "--run", path, "--out", tmp_path / "other" / "bits.json", *options
    )


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
@pytest.mark.parametrize("is_link", [False, True], ids=["", "link"])
def test_what_is_no_file_is_refused_and_stays(command, tmp_path, said, force, is_link):
    pipe, path = tmp_path / "pipe", tmp_path / "run"
    os.mkfifo(pipe)
    if is_link:
        path.symlink_to(pipe)
    else:
        path = pipe
    outcome = command("no/such-model", path, *force)
    assert outcome.exit_code == 2
    assert "is no file, and a run file is read again after each result" in said(outcome)
    assert stat.S_ISFIFO(pipe.lstat().st_mode)
    assert path.is_symlink() == is_link


def test_a_link_is_written_through(command, tiny_model_folder, tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("theirs")
    link.symlink_to(target)
    assert command(tiny_model_folder, link, "--force").exit_code in (0, 1)
    assert link.is_symlink()
    assert json.loads(target.read_text())["results"]


def test_a_link_into_no_folder_is_named_before_a_model_is_loaded(command, tmp_path, said):
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "none" / "run.json")
    outcome = command("no/such-model", link)
    assert outcome.exit_code == 2
    assert "none to write link to" in said(outcome)


def test_a_file_that_appears_while_the_model_loads_is_not_replaced(
    command, meanwhile, tiny_model_folder, tmp_path, said
):
    path = tmp_path / "run.json"
    meanwhile(lambda: path.write_text("theirs"))
    outcome = command(tiny_model_folder, path)
    assert outcome.exit_code == 2
    assert "run.json is no run file, or damaged" in said(outcome)
    assert path.read_text() == "theirs"


def test_a_run_that_is_begun_while_the_model_loads_is_gone_on_with(
    run_eval, meanwhile, continued, tiny_model_folder, tmp_path
):
    theirs = continued(lambda name: name != "greedy/tq4")
    results = json.loads(theirs.read_text())["results"]
    results["quality/tq4"]["mean_kl"] = 123.0
    content = json.dumps(json.loads(theirs.read_text()) | {"results": results})
    theirs.unlink()
    for force in ((), ("--force",)):
        meanwhile(lambda: theirs.write_text(content))
        assert run_eval(tiny_model_folder, "--out", theirs, *force).exit_code == 0
        found = read_run_file(theirs, "turboquant eval").results
        assert found["quality/tq4"]["mean_kl"] == 123.0
        assert "greedy/tq4" in found
        theirs.unlink()
