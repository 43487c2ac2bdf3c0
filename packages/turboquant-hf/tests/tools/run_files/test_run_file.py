import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turboquant_core.testing.damage import damaged_bytes, damaged_json, read_or_refused
from turboquant_hf.tools.eval.settings import EVAL
from turboquant_hf.tools.eval.summary import summarise
from turboquant_hf.tools.run_files.run_file import RunFile, lock_path, read_run_file


def changed(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_results_are_there_after_each(tmp_path):
    run = RunFile(tmp_path / "run.json", EVAL, {"settings": {}, "environment": {}, "model": {}})
    for number in range(3):
        run.add(f"greedy/{number}", {"tokens": [[number]]})
        assert read_run_file(run.path, EVAL).results == run.results
    assert len(run.results) == 3
    assert list(tmp_path.iterdir()) == [run.path]


HEADER = {"settings": {"seed": 1, "lengths": (1, 2)}, "environment": {}, "model": {}}


def test_two_runs_of_one_file_keep_the_results_of_both(tmp_path):
    path = tmp_path / "run.json"
    first, second = RunFile(path, EVAL, HEADER), RunFile(path, EVAL, HEADER)
    for number in range(2):
        first.add(f"first/{number}", {})
        second.add(f"second/{number}", {})
    assert read_run_file(path, EVAL).results.keys() == {"first/0", "first/1", "second/0", "second/1"}


def test_runs_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "run.json"
    begin = Barrier(3)

    def write(name):
        run = RunFile(path, EVAL, HEADER)
        begin.wait()
        for number in range(20):
            run.add(f"{name}/{number}", {"number": number})

    # The lock is of an open file, and every run opens its own: threads are to it as processes are.
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(write, ("a", "b", "c")))
    assert len(read_run_file(path, EVAL).results) == 60
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_with_other_settings_is_not_written_over(tmp_path):
    path = tmp_path / "run.json"
    RunFile(path, EVAL, {**HEADER, "settings": {"seed": 2, "lengths": [1, 2]}}).add("theirs", {})
    content = path.read_bytes()
    with pytest.raises(ValueError, match=r"another run meanwhile, with other settings: seed is 2 there and 1 here\. "):
        RunFile(path, EVAL, HEADER).add("ours", {})
    path.write_text("damaged")
    with pytest.raises(ValueError, match="damaged or half-written"):
        RunFile(path, EVAL, HEADER).add("ours", {})
    path.write_bytes(content)
    assert list(tmp_path.iterdir()) == [path]


@given(random=st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_read_or_refused_by_name(tmp_path, random):
    path = tmp_path / "run.json"
    data = {"format": "turboquant eval", "version": 1, **HEADER, "results": {"quality/tq4": {"mean_kl": 0.5}}}
    content = damaged_json(data, random).encode("utf-8", "surrogatepass")
    content = content if random.random() < 0.6 else damaged_bytes(content, random)
    run = read_or_refused(partial(read_run_file, command=EVAL), path, content, "run file")
    if run is not None:
        assert all(isinstance(run.header[section], dict) for section in HEADER)
        assert isinstance(run.results, dict)


def test_a_file_that_others_wrote_is_replaced_by_force_at_the_first_result(tmp_path):
    path = tmp_path / "run.json"
    path.write_text("theirs")
    run = RunFile(path, EVAL, HEADER, force=True)
    assert path.read_text() == "theirs"
    run.add("ours", {})
    assert read_run_file(path, EVAL).results.keys() == {"ours"}
    path.write_text("theirs")
    with pytest.raises(ValueError, match="no run file, or damaged"):
        run.add("more", {})
    assert path.read_text() == "theirs"


def test_force_does_not_replace_a_run_that_was_begun_meanwhile(tmp_path):
    path = tmp_path / "run.json"
    run = RunFile(path, EVAL, HEADER, force=True)
    RunFile(path, EVAL, HEADER).add("theirs", {})
    run.add("ours", {})
    assert read_run_file(path, EVAL).results.keys() == {"theirs", "ours"}


def test_runs_through_links_have_one_lock_beside_the_target(tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "link.json"
    link.symlink_to(tmp_path / "run.json")
    RunFile(link, EVAL, HEADER).add("ours", {})
    assert link.is_symlink()
    assert lock_path(link) == lock_path(tmp_path / "run.json")
    assert read_run_file(tmp_path / "run.json", EVAL).results.keys() == {"ours"}


def test_a_lock_takes_no_name_that_somebody_uses(tmp_path):
    for name in ("run.lock", ".run.lock"):
        (tmp_path / name).touch()
    RunFile(tmp_path / "run", EVAL, HEADER).add("ours", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.lock", "run", "run.lock"]


def test_a_run_file_may_have_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ("x" * 255)
    RunFile(path, EVAL, HEADER).add("ours", {})
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_lock_is_refused(tmp_path):
    run = RunFile(tmp_path / "run.json", EVAL, HEADER)
    lock = lock_path(run.path)
    lock.write_text("theirs")
    with pytest.raises(ValueError, match=r"\.lock is to be an empty file"):
        run.add("ours", {})
    assert lock.read_text() == "theirs"
    lock.unlink()
    lock.symlink_to(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"\.lock is to be an empty file"):
        run.add("ours", {})
    assert list(tmp_path.iterdir()) == [lock]
    lock.unlink()
    # What a run left that was killed.
    lock.touch()
    run.add("ours", {})
    assert list(tmp_path.iterdir()) == [run.path]


def test_numbers_that_json_has_not_are_refused(tmp_path):
    run = RunFile(tmp_path / "run.json", EVAL, {"settings": {}, "environment": {}, "model": {}})
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
        read_run_file(path, EVAL)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match="damaged"):
        read_run_file(tmp_path / "run.json", EVAL)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data.pop("settings"), "no section 'settings'"),
        (lambda data: data["settings"].pop("seed"), "settings are caches"),
        (lambda data: data["settings"].update(num_tokens="many"), "no number of tokens"),
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
        summarise(read_run_file(path, EVAL))
    assert "run.json is a damaged run file" in str(caught.value)
