"""Bits of every layer: chosen, compared, kept."""

import itertools
import json
from importlib.metadata import entry_points

import pytest
import torch
from typer.testing import CliRunner

from turboquant_core import grid_codebook
from turboquant_core.commands import app
from turboquant_core.layer_bits import read_layer_bits
from turboquant_hf import TurboQuantCache
from turboquant_hf.tools.tune.allocate import allocate
from turboquant_hf.tools.tune.command import PROBE_BITS, tune
from turboquant_hf.tools.tune.sensitivity import costs


@pytest.fixture(scope="module")
def tuned(run_tune, tiny_model_folder, tmp_path_factory):
    """A file, beside its run file, and what the command said."""
    path = tmp_path_factory.mktemp("tune") / "turboquant.json"
    outcome = run_tune(tiny_model_folder, "--target-bits", 3.5, "--out", path)
    assert outcome.exit_code in (0, 1), outcome.output
    return path, outcome


@pytest.fixture
def copied(tuned, tmp_path):
    """The run file of `tuned` where another file's would be."""
    path = tmp_path / "turboquant.json.run.json"
    path.write_bytes((tuned[0].parent / path.name).read_bytes())
    return path


def results(path):
    return json.loads(path.read_text())["results"]


def test_core_finds_the_command():
    (entry_point,) = entry_points(group="turboquant.commands", name="tune")
    assert entry_point.load() is tune


def test_no_choice_within_the_budget_costs_less():
    generator = torch.Generator().manual_seed(3)
    sizes = [3, 3, 6, 2]
    for budget in (28, 40, 57, 70, 200):
        table = [dict(zip((2, 3, 5), torch.rand(3, generator=generator).tolist(), strict=True)) for _ in sizes]
        chosen = allocate(table, sizes, budget)
        spent = [
            sum(bits * size for bits, size in zip(choice, sizes, strict=True))
            for choice in (chosen, *itertools.product((2, 3, 5), repeat=4))
        ]
        total = [
            sum(cost[bits] for cost, bits in zip(table, choice, strict=True))
            for choice in (chosen, *itertools.product((2, 3, 5), repeat=4))
        ]
        assert spent[0] <= budget
        best = min(cost for cost, nbytes in zip(total, spent, strict=True) if nbytes <= budget)
        assert total[0] == pytest.approx(best)
    with pytest.raises(ValueError, match="the budget is 27 bytes; the fewest bits of all take 28"):
        allocate([{2: 0, 3: 0}] * 4, sizes, 27)


def test_what_was_not_measured_goes_with_the_squared_error():
    found = costs({3: 0.1, 2: 0.7}, 64)
    assert (found[2], found[3]) == (0.7, 0.1)
    for bits in (4, 5, 6, 8):
        share = grid_codebook(64, bits).mse / grid_codebook(64, 3).mse
        assert found[bits] == pytest.approx(0.1 * share)


def test_the_file_is_one_that_a_cache_takes_and_keeps_to_the_budget(tuned, tiny_model):
    path, _ = tuned
    bits = read_layer_bits(path)
    assert bits.layer_bits.keys() == {0, 1}
    assert sum(map(sum, bits.layer_bits.values())) <= 4 * 3.5
    cache = TurboQuantCache(tiny_model.config, layer_bits=path)
    tiny_model(torch.zeros(1, 4, dtype=torch.long), past_key_values=cache)
    for index, pair in bits.layer_bits.items():
        assert (cache.layers[index].config.key_bits, cache.layers[index].config.value_bits) == pair


def test_it_compares_with_uniform_bits_on_other_text_and_says_which_are_better(tuned):
    path, outcome = tuned
    ours, *uniform = read_layer_bits(path).measured["held_out"]
    assert ours["bits"] == "tuned"
    assert {choice["bits"] for choice in uniform} == {"4/3", "3.5/3.5"}
    for choice in (ours, *uniform):
        assert choice["mean_kl"] > 0
        assert f"{choice['mean_kl']:.4f}" in outcome.stdout
    # Two layers of two heads of 64, with a scale for each vector; fractional bits have two.
    sizes = {choice["bits"]: choice["token_nbytes"] for choice in uniform}
    assert sizes == {"4/3": 4 * (32 + 2 + 24 + 2), "3.5/3.5": 4 * 2 * (28 + 4)}
    assert ours["token_nbytes"] <= sizes["4/3"]
    is_better = ours["mean_kl"] < min(choice["mean_kl"] for choice in uniform)
    assert outcome.exit_code == (0 if is_better else 1)


def test_where_uniform_bits_are_better_it_says_so(run_tune, copied, tiny_model_folder, tmp_path, said):
    data = json.loads(copied.read_text())
    data["results"]["held out/4/3"]["mean_kl"] = 1e-6
    copied.write_text(json.dumps(data))
    outcome = run_tune(tiny_model_folder, "--out", tmp_path / "turboquant.json", "--json", tmp_path / "out.json")
    assert outcome.exit_code == 1, outcome.output
    assert "tuned bits are no better here: 4/3 in every layer" in said(outcome)
    assert "key_bits=4, value_bits=3" in said(outcome)
    assert json.loads((tmp_path / "out.json").read_text())["is_better"] is False


def test_files_of_others_are_kept(run_tune, tuned, tmp_path, said):
    notes = tmp_path / "notes.json"
    notes.write_text("{}")
    for options, reason in (
        (("--out", notes), "this command did not write it"),
        (("--out", tmp_path / "new.json", "--run", notes), "is no run file"),
        (("--out", tmp_path / "new.json", "--run", tmp_path / "new.json"), "--out and --run are the same file"),
        (("--out", tuned[0].parent / "turboquant.json.run.json"), "this command did not write it"),
        (("--out", tuned[0], "--json", tuned[0]), "this command did not write it"),
        (("--out", tuned[0], "--json", tuned[0], "--force"), "--out and --json are the same file"),
    ):
        outcome = run_tune("no/such-model", *options)
        assert outcome.exit_code == 2, options
        assert reason in said(outcome)
    assert notes.read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]
    assert read_layer_bits(tuned[0]).layer_bits


def test_interrupted_it_goes_on_and_gives_the_same(run_tune, tuned, tiny_model_folder, tmp_path, monkeypatch, said):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    path = tmp_path / "turboquant.json"
    with monkeypatch.context() as patched:
        patched.setattr("turboquant_hf.tools.tune.search.score_caches", interrupt)
        outcome = run_tune(tiny_model_folder, "--target-bits", 3.5, "--out", path)
    assert outcome.exit_code == 130
    assert "the same command goes on" in said(outcome)
    assert not path.exists()
    kept = results(tmp_path / "turboquant.json.run.json")
    assert kept.keys() == {f"layer/{index}/{bits}" for index in (0, 1) for bits in PROBE_BITS}
    assert run_tune(tiny_model_folder, "--target-bits", 3.5, "--out", path).exit_code == tuned[1].exit_code
    assert read_layer_bits(path) == read_layer_bits(tuned[0])


def test_another_target_takes_what_was_measured(run_tune, copied, tiny_model_folder, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr("turboquant_hf.tools.tune.search.measure_sensitivity", fail)
    before = results(copied)
    outcome = run_tune(tiny_model_folder, "--target-bits", 5, "--out", tmp_path / "turboquant.json", "--json", "-")
    data = json.loads(outcome.stdout)
    assert data["target_bits"] == 5
    assert {choice["bits"] for choice in data["held_out"]} == {"tuned", "5/5", "6/4"}
    assert results(copied).items() >= before.items()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data["settings"].update(num_tokens=7), "num tokens is 7 there and 512 here"),
        (lambda data: data["environment"].update(torch="1.0"), 'torch is "1.0" there'),
        (lambda data: data["model"].update(name="other"), "begun with other weights"),
        (lambda data: data["results"]["layer/0/3"].update(keys="x"), "layer/0/3: keys of Sensitivity is no"),
        (lambda data: data["results"].update({"held out/4/3": {}}), "HeldOut has the fields"),
        (lambda data: data.update(format="turboquant eval"), "is no run file of `turboquant tune`"),
    ],
)
def test_a_run_file_of_something_else_is_refused(run_tune, copied, tiny_model_folder, tmp_path, said, change, reason):
    data = json.loads(copied.read_text())
    change(data)
    copied.write_text(json.dumps(data))
    outcome = run_tune(tiny_model_folder, "--out", tmp_path / "turboquant.json")
    assert outcome.exit_code == 2
    assert reason in said(outcome)
    assert "--run" in said(outcome)
    assert json.loads(copied.read_text()) == data
    assert not (tmp_path / "turboquant.json").exists()


def test_a_half_written_run_file(run_tune, copied, tiny_model_folder, tmp_path, said):
    copied.write_text(copied.read_text()[:200])
    outcome = run_tune(tiny_model_folder, "--out", tmp_path / "turboquant.json")
    assert outcome.exit_code == 2
    assert "damaged or half-written" in said(outcome)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--target-bits", 9), "'--target-bits'"),
        (("--target-bits", 1), "'--target-bits'"),
        (("--tokens", 2), "'--tokens'"),
        (("--out", "none/bits.json"), "there is no folder none"),
        (("--text", "missing.txt"), "cannot read missing.txt"),
    ],
)
def test_wrong_arguments(said, options, reason):
    outcome = CliRunner().invoke(app, ["tune", "no/such-model", *map(str, options)], env={"COLUMNS": "160"})
    assert outcome.exit_code == 2
    assert reason in said(outcome)


def test_a_text_that_is_too_short(run_tune, tiny_model_folder, tmp_path, said):
    (tmp_path / "short.txt").write_text("Shakespeare was born " * 300)
    outcome = run_tune(tiny_model_folder, "--text", tmp_path / "short.txt", "--out", tmp_path / "bits.json")
    assert outcome.exit_code == 2
    assert "the text has 900 tokens" in said(outcome)
    assert "Pass --text with a longer one" in said(outcome)
    assert list(tmp_path.iterdir()) == [tmp_path / "short.txt"]
