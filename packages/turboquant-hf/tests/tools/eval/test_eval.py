import json
import shutil
from dataclasses import replace
from importlib.metadata import entry_points

import pytest
import torch
from transformers import BertConfig, DynamicCache, LlamaForCausalLM

from turboquant_core.calibration import Calibration, write_calibration
from turboquant_core.key_transform import KeyTransform
from turboquant_core.model_identity import ModelIdentity
from turboquant_hf import TurboQuantCache
from turboquant_hf._compat import HAS_FP8_CACHE
from turboquant_hf.scoring import score_caches
from turboquant_hf.tools.article import article
from turboquant_hf.tools.caches import CACHES, UNCOMPRESSED
from turboquant_hf.tools.eval.command import evaluate


def results(path):
    """All results but speed, which no seed makes the same."""
    found = json.loads(path.read_text())["results"]
    return {name: result for name, result in found.items() if not name.startswith("speed/")}


def test_core_finds_the_command():
    (entry_point,) = entry_points(group="turboquant.commands", name="eval")
    assert entry_point.load() is evaluate


def test_every_cache_is_measured_in_every_way(finished):
    path, output = finished
    assert json.loads(path.read_text())["results"].keys() == {
        *("quality/uncompressed", "quality/tq4", "quality/k8v4", "layers/tq4", "layers/k8v4"),
        *("needle/128/0", "needle/128/1", "greedy/uncompressed", "greedy/tq4", "greedy/k8v4"),
        *("speed/tq4", "speed/k8v4"),
    }
    found = results(path)
    assert f"{found['quality/tq4']['mean_kl']:.4f}" in output
    assert f"{found['quality/tq4']['bytes_per_token']:,.0f}" in output
    for name in ("tq4", "k8v4"):
        assert len(found[f"greedy/{name}"]["tokens"]) == 4
        assert [layer["index"] for layer in found[f"layers/{name}"]["layers"]] == [0, 1]
    assert found["needle/128/0"]["caches"].keys() == {UNCOMPRESSED, "tq4", "k8v4"}


def test_quality_is_what_scoring_says_and_bytes_are_those_of_bfloat16(finished, tiny_model, tiny_model_folder):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(tiny_model_folder)(article(), return_tensors="pt")["input_ids"][:, :384]
    cache = TurboQuantCache(tiny_model.config, "tq4")
    expected = score_caches(tiny_model, ids, DynamicCache(config=tiny_model.config), {"tq4": cache})["tq4"]
    found = results(finished[0])["quality/tq4"]
    assert found["mean_kl"] == pytest.approx(expected.mean_kl, rel=1e-6)
    assert found["num_tokens"] == expected.num_tokens == 255
    assert results(finished[0])["quality/uncompressed"]["bytes_per_token"] == 2 * 2 * 2 * 64 * 2
    # Codes of 4 bits and a scale for each vector, tokens that are kept as they are, and room for those to come.
    codes = 2 * 2 * 2 * (64 * 4 / 8 + 2)
    assert codes < found["bytes_per_token"] < 1.5 * codes


@pytest.fixture(scope="module")
def calibration(tiny_model, tmp_path_factory):
    """A calibration file whose scale makes every key worse, and whose order splits those that can be."""
    path = tmp_path_factory.mktemp("calibration") / "turboquant.safetensors"
    scale, order = torch.linspace(-3, 3, 64).exp(), torch.arange(64)
    transform = KeyTransform(scale=scale.repeat(2, 1), order=order.repeat(2, 1))
    identity = ModelIdentity.of(tiny_model.config, "LlamaForCausalLM")
    write_calibration(path, Calibration({0: transform, 1: transform}, identity, "a/model", num_tokens=9))
    return path


def test_presets_are_measured_with_a_calibration_file(
    finished, run_eval, tiny_model, tiny_model_folder, tmp_path, calibration, said
):
    path, options = tmp_path / "run.json", ("--measure", "quality", "--measure", "layers", "--calibration", calibration)
    outcome = run_eval(tiny_model_folder, "--out", path, *options)
    assert outcome.exit_code == 0, outcome.output
    found, plain = results(path), results(finished[0])
    assert found["quality/uncompressed"] == plain["quality/uncompressed"]
    for name in ("tq4", "k8v4"):
        assert found[f"quality/{name}"]["mean_kl"] > plain[f"quality/{name}"]["mean_kl"]
        for layer, without in zip(found[f"layers/{name}"]["layers"], plain[f"layers/{name}"]["layers"], strict=True):
            assert layer["key_error"] > 1.5 * without["key_error"]
            assert layer["value_error"] == without["value_error"]
    split, whole = (
        found[f"quality/{name}"]["bytes_per_token"] - plain[f"quality/{name}"]["bytes_per_token"]
        for name in ("tq4", "k8v4")
    )
    # Two bytes for each key, of which two layers have two, and of those that there is room for.
    assert 8 <= split - whole < 12
    refused = run_eval(tiny_model_folder, "--out", path, *options[:-2])
    assert refused.exit_code == 2
    assert "calibration sha256" in said(refused)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--calibration", "none.safetensors"), "cannot read none.safetensors"),
        (("--cache", "tq2.5"), "key_bits are 2.5"),
    ],
)
def test_a_calibration_that_does_not_do_is_refused_at_once(
    run_eval, tiny_model_folder, tmp_path, calibration, said, options, reason
):
    outcome = run_eval(tiny_model_folder, "--out", tmp_path / "run.json", "--calibration", calibration, *options)
    assert outcome.exit_code == 2
    assert reason in said(outcome)
    assert not any("results" in file.read_text() and results(file) for file in tmp_path.iterdir())


def test_again_gives_the_same(finished, run_eval, tiny_model_folder, tmp_path):
    path = tmp_path / "again.json"
    assert run_eval(tiny_model_folder, "--out", path).exit_code == 0
    assert results(path) == results(finished[0])


def test_continued_gives_the_same(finished, continued, run_eval, tiny_model_folder):
    path = continued(lambda name: name in ("quality/uncompressed", "needle/128/1", "greedy/uncompressed"))
    outcome = run_eval(tiny_model_folder, "--out", path, "--resume")
    assert outcome.exit_code == 0, outcome.output
    assert results(path) == results(finished[0])


def test_what_is_there_is_not_measured_again(continued, run_eval, tiny_model_folder):
    path = continued(lambda name: True)
    data = json.loads(path.read_text())
    data["results"]["quality/tq4"]["mean_kl"] = 123.0
    path.write_text(json.dumps(data))
    assert run_eval(tiny_model_folder, "--out", path).exit_code == 0
    assert results(path)["quality/tq4"]["mean_kl"] == 123.0


def test_interrupted_it_keeps_what_it_has(finished, run_eval, tiny_model_folder, tmp_path, monkeypatch, said):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    path = tmp_path / "run.json"
    with monkeypatch.context() as patched:
        patched.setattr("turboquant_hf.tools.eval.evaluation.find_needle", interrupt)
        outcome = run_eval(tiny_model_folder, "--out", path)
    assert outcome.exit_code == 130
    assert "the same command goes on" in said(outcome)
    kept = results(path)
    assert kept.keys() == {name for name in results(finished[0]) if name.startswith(("quality", "layers"))}
    assert list(tmp_path.iterdir()) == [path]
    assert run_eval(tiny_model_folder, "--out", path).exit_code == 0
    assert results(path) == results(finished[0])


def test_json_alone(continued, run_eval, tiny_model_folder):
    outcome = run_eval(tiny_model_folder, "--out", continued(lambda name: True), "--json", "-")
    data = json.loads(outcome.stdout)
    assert [cache["cache"] for cache in data["caches"]] == [UNCOMPRESSED, "tq4", "k8v4"]
    assert data["units_missing"] == 0
    assert data["caches"][0]["greedy_tokens_shared"] == [6, 6, 6, 6]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("--seed", 1), "seed is 0 there and 1 here"),
        (("--measure", "speed"), "measurements is"),
        (("--text", "other.txt"), "text sha256 is"),
    ],
)
def test_a_run_with_other_settings_is_refused(
    continued, run_eval, tiny_model_folder, tmp_path, monkeypatch, said, change, reason
):
    (tmp_path / "other.txt").write_text("Shakespeare was born " * 400)
    monkeypatch.chdir(tmp_path)
    path = continued(lambda name: "quality" in name)
    before = path.read_bytes()
    outcome = run_eval(tiny_model_folder, "--out", path, *change)
    assert outcome.exit_code == 2
    assert reason in said(outcome)
    assert path.read_bytes() == before


def test_a_run_of_another_model_is_refused(continued, run_eval, tiny_model_folder, tiny_config, tmp_path, said):
    folder, path = tmp_path / "model", continued(lambda name: "quality" in name)
    LlamaForCausalLM(tiny_config()).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_model_folder / name).read_bytes())
    outcome = run_eval(folder, "--out", path)
    assert outcome.exit_code == 2
    assert "fingerprint is" in said(outcome)


def test_a_run_of_another_version_is_refused(continued, run_eval, tiny_model_folder, said):
    path = continued(lambda name: "quality" in name)
    data = json.loads(path.read_text())
    data["environment"]["torch"] = "1.0"
    path.write_text(json.dumps(data))
    outcome = run_eval(tiny_model_folder, "--out", path)
    assert outcome.exit_code == 2
    assert 'torch is "1.0" there' in said(outcome)


def test_nothing_to_resume(run_eval, tmp_path, said):
    outcome = run_eval("--out", tmp_path / "run.json", "--resume")
    assert outcome.exit_code == 2
    assert "there is no run file" in said(outcome)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--cache", "tq5"), "there is no cache 'tq5'; there are uncompressed, tq4"),
        (("--measure", "speeed"), "there is no measurement 'speeed'; there are quality"),
        (("--device", "warp"), "there is no device warp"),
        (("--text", "missing.txt"), "cannot read missing.txt"),
        (("--out", "none/run.json"), "there is no folder none"),
        (("--out", "."), "is a folder; name a file to write"),
    ],
)
def test_wrong_arguments_are_named_before_a_model_is_loaded(run_eval, said, options, reason):
    outcome = run_eval("no/such-model", *options)
    assert outcome.exit_code == 2
    assert reason in said(outcome)


@pytest.mark.parametrize("name", ["quanto4", "hqq2"])
def test_a_package_that_is_not_installed_is_named(run_eval, monkeypatch, said, name):
    monkeypatch.setattr("turboquant_hf.tools.caches.find_spec", lambda module: None)
    outcome = run_eval("no/such-model", "--cache", name)
    assert outcome.exit_code == 2
    assert f"the cache {name} needs the package {CACHES[name].package}" in said(outcome)


def test_caches_that_need_one_are_left_out_by_default(run_eval, tiny_model_folder, tmp_path, monkeypatch, said):
    monkeypatch.setattr("turboquant_hf.tools.caches.find_spec", lambda module: None)
    path = tmp_path / "run.json"
    outcome = run_eval(tiny_model_folder, "--out", path, "--measure", "greedy", "--greedy-tokens", 1, small=False)
    assert outcome.exit_code == 0, outcome.output
    assert "quanto4 is left out: it needs the package optimum-quanto" in said(outcome)
    expected = ["k8v4", "k6v4", "tq4", "tq3", "tq2", *(["fp8"] if HAS_FP8_CACHE else [])]
    assert json.loads(path.read_text())["settings"]["caches"] == expected


def test_a_cache_of_others_that_fails_is_left_out(run_eval, tiny_model_folder, tmp_path, monkeypatch, said):
    def broken(config):
        raise TypeError("no such thing\nat all")

    patched = {**CACHES, "hqq4": replace(CACHES["hqq4"], new=broken, package=None)}
    for module in ("caches", "eval.units", "eval.evaluation", "eval.summary"):
        monkeypatch.setattr(f"turboquant_hf.tools.{module}.CACHES", patched)
    path = tmp_path / "run.json"
    outcome = run_eval(
        tiny_model_folder, "--out", path, "--cache", "hqq4", "--measure", "needle", "--measure", "quality"
    )
    assert outcome.exit_code == 0, outcome.output
    assert "hqq4 fails: TypeError: no such thing" in said(outcome)
    found = results(path)
    assert "hqq4" not in found["needle/128/0"]["caches"]
    assert "quality/hqq4" not in found


def test_a_cache_of_others_that_fails_later_has_the_rest(run_eval, tiny_model_folder, tmp_path, monkeypatch, said):
    class Short(DynamicCache):
        def update(self, key_states, *args, **kwargs):
            if key_states.shape[-2] > 150:
                raise ValueError("too long")
            return super().update(key_states, *args, **kwargs)

    patched = {**CACHES, "hqq4": replace(CACHES["hqq4"], new=lambda config: Short(config=config), package=None)}
    for module in ("caches", "eval.units", "eval.evaluation", "eval.summary"):
        monkeypatch.setattr(f"turboquant_hf.tools.{module}.CACHES", patched)
    path = tmp_path / "run.json"
    options = ("--cache", "hqq4", "--measure", "needle", "--needle-length", 200)
    outcome = run_eval(tiny_model_folder, "--out", path, *options)
    assert outcome.exit_code == 0, outcome.output
    assert "hqq4 fails: ValueError: too long" in said(outcome)
    short, long = (results(path)[f"needle/{length}/0"]["caches"] for length in (128, 200))
    assert short["hqq4"].keys() == long["tq4"].keys() == {"share", "found"}
    assert long["hqq4"] == {"fails": "ValueError: too long"}


def test_numbers_that_are_none_are_said(run_eval, tiny_model_folder, tmp_path, monkeypatch, said):
    monkeypatch.setattr("turboquant_hf.tools.eval.evaluation.bytes_per_token", lambda *args: float("nan"))
    path = tmp_path / "run.json"
    outcome = run_eval(tiny_model_folder, "--out", path, "--measure", "quality")
    assert outcome.exit_code == 0, outcome.output
    assert results(path)["quality/tq4"] == {"fails": "bytes_per_token is nan"}
    assert "tq4 fails: bytes_per_token is nan" in said(outcome)


@pytest.mark.parametrize("name", ["hqq4", "fp8"])
def test_caches_of_others(run_eval, tiny_model_folder, tmp_path, name):
    if CACHES[name].missing:
        pytest.skip(f"{name} needs {CACHES[name].missing}")
    path = tmp_path / "run.json"
    options = ("--cache", name, "--tokens", 384, "--needle-length", 128, "--needle-depths", 2, "--greedy-tokens", 3)
    outcome = run_eval(tiny_model_folder, "--out", path, *options, small=False)
    assert outcome.exit_code == 0, outcome.output
    found = results(path)
    assert found[f"check/{name}"] == {}
    assert 0 < found[f"quality/{name}"]["mean_kl"] < 1
    assert found[f"quality/{name}"]["bytes_per_token"] < found["quality/uncompressed"]["bytes_per_token"]


def test_a_folder_without_config(run_eval, tmp_path, said):
    outcome = run_eval(tmp_path, "--out", tmp_path / "run.json")
    assert outcome.exit_code == 2
    assert f"cannot load {tmp_path}: the folder {tmp_path} has no config.json" in said(outcome)


def test_weights_that_are_cut_off(run_eval, tiny_model_folder, tmp_path, said):
    folder = shutil.copytree(tiny_model_folder, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    outcome = run_eval(folder, "--out", tmp_path / "run.json")
    assert outcome.exit_code == 2
    assert f"cannot load {folder}: a safetensors file of {folder} is cut off or damaged" in said(outcome)


def test_an_encoder(run_eval, tmp_path, said):
    BertConfig().save_pretrained(tmp_path)
    outcome = run_eval(tmp_path, "--out", tmp_path / "run.json")
    assert outcome.exit_code == 2
    assert "is an encoder" in said(outcome)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--tokens", 100_000), "100,000 are to be read"),
        (("--needle-length", 9000), "takes 8,192 tokens, and 9,000 are asked for"),
        (("--needle-length", 20), "a needle length of 20 tokens is too short"),
    ],
)
def test_lengths_that_do_not_fit(run_eval, tiny_model_folder, tmp_path, said, options, reason):
    outcome = run_eval(tiny_model_folder, "--out", tmp_path / "run.json", *options)
    assert outcome.exit_code == 2
    assert reason in said(outcome)
    assert not (tmp_path / "run.json").exists()
