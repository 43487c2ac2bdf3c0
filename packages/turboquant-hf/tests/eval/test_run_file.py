import json

import pytest

from turboquant_hf.eval.run_file import RunFile, read_run_file
from turboquant_hf.eval.summary import summarise


def changed(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_results_are_there_after_each(tmp_path):
    run = RunFile(tmp_path / "run.json", {"settings": {}, "environment": {}, "model": {}})
    for number in range(3):
        run.add(f"greedy/{number}", {"tokens": [[number]]})
        assert read_run_file(run.path).results == run.results
    assert len(run.results) == 3
    assert list(tmp_path.iterdir()) == [run.path]


def test_numbers_that_json_has_not_are_refused(tmp_path):
    run = RunFile(tmp_path / "run.json", {"settings": {}, "environment": {}, "model": {}})
    with pytest.raises(ValueError, match="not JSON compliant"):
        run.add("quality/tq4", {"mean_kl": float("nan")})
    assert not run.path.exists()


def test_a_half_written_file(continued, run_eval, tiny_model_folder, said):
    path = continued(lambda name: True)
    half = path.read_text()[: len(path.read_text()) // 2]
    path.write_text(half)
    outcome = run_eval(tiny_model_folder, "--out", path)
    assert outcome.exit_code == 2
    assert "damaged or half-written" in said(outcome)
    assert path.read_text() == half


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "turboquant eval", "version": 2}', "\x00\x01"])
def test_what_is_no_run_file(tmp_path, content):
    path = tmp_path / "run.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is"):
        read_run_file(path)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match="damaged"):
        read_run_file(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.pop("settings"), "no section 'settings'"),
        (lambda data: data["settings"].pop("seed"), "settings are caches"),
        (lambda data: data["settings"].update(num_tokens="many"), "of another type"),
        (lambda data: data["settings"].update(caches=["tq5"]), "no cache 'tq5'"),
        (lambda data: data["settings"].update(measurements=["taste"]), "no measurement 'taste'"),
        (lambda data: data["model"].pop("name"), "'model' has no name"),
        (lambda data: data["results"].update({"quality/tq3": {}}), "know of no quality/tq3"),
        (lambda data: data["results"]["quality/tq4"].pop("mean_kl"), "Quality has the fields"),
        (lambda data: data["results"]["quality/tq4"].update(mean_kl="low"), "mean_kl of Quality"),
        (lambda data: data["results"].update({"greedy/tq4": {"tokens": [1]}}), "tokens of Greedy"),
        (lambda data: data["results"].pop("greedy/uncompressed"), "greedy/tq4 has other lengths"),
        (lambda data: data["results"]["greedy/tq4"]["tokens"].pop(), "greedy/tq4 has other lengths"),
        (lambda data: data["results"].update({"layers/tq4": []}), "it is not layers"),
        (lambda data: data["results"]["needle/128/0"]["caches"].update(tq3={}), "has a cache 'tq3'"),
        (lambda data: data["results"].update({"quality/tq4": 5}), "Quality has the fields"),
    ],
)
def test_damage_is_named(continued, change, reason):
    path = continued(lambda name: True)
    changed(path, change)
    with pytest.raises(ValueError, match=reason) as caught:
        summarise(read_run_file(path))
    assert "run.json is a damaged run file" in str(caught.value)
