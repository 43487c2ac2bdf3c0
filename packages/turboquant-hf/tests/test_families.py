"""Every decoder family of transformers is right or refused by name, and docs/families.md says which."""

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import transformers
from transformers import CLIPConfig, ViTConfig, Wav2Vec2Config

from turboquant_hf import TurboQuantCache

ROOT = Path(__file__).parents[3]
spec = spec_from_file_location("families", ROOT / "scripts" / "families.py")
families = module_from_spec(spec)
spec.loader.exec_module(families)
PAGE = families.PAGE.read_text(encoding="utf-8")
IS_OF_THIS_VERSION = f"transformers {transformers.__version__} " in PAGE
LINES = [line for line in PAGE.splitlines() if line.startswith("| ")][1:]
ROWS = {row.family: row for row in map(families.Row.read, LINES)}


@pytest.mark.parametrize("family", families.families())
def test_a_family_is_right_or_refused(family):
    row = families.try_family(family)
    assert set(row.results) <= {"right", "refused", "not offered"}
    if IS_OF_THIS_VERSION:
        assert row == ROWS[family]


@pytest.mark.skipif(not IS_OF_THIS_VERSION, reason="the page was made with another version of transformers")
def test_the_page_has_every_family_and_nothing_else():
    assert list(ROWS) == families.families()
    assert families.page(list(ROWS.values())) == PAGE


def test_a_family_that_transformers_does_not_run_fails(monkeypatch):
    def broken(*arguments, **named):
        raise RuntimeError("no such configuration")

    monkeypatch.setattr(families, "step_logits", broken)
    with pytest.raises(RuntimeError, match="no such configuration"):
        families.try_family("llama")


@pytest.mark.parametrize(
    "message", ["this model has no heads. Use DynamicCache for it.", "this llama model has no heads"]
)
def test_a_refusal_without_a_name_or_a_remedy_fails(message):
    with pytest.raises(AssertionError, match="llama"):
        families.check_refusal("llama", families.build("llama"), message)


@pytest.mark.parametrize("kind", [CLIPConfig, ViTConfig, Wav2Vec2Config])
def test_models_that_keep_no_cache_are_refused(kind):
    with pytest.raises(ValueError, match=f"{kind.model_type} model takes no DynamicCache"):
        TurboQuantCache(kind())
