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
ROWS = dict(line[2:].split(" | ", 1) for line in PAGE.splitlines() if line.startswith("| "))


@pytest.mark.parametrize("family", families.families())
def test_a_family_is_right_or_refused(family):
    row = families.try_family(family)
    assert set(row.results) <= {"right", "refused", "not offered", "-"}
    if f"transformers {transformers.__version__} " in PAGE:
        assert str(row) == f"| {family} | {ROWS[family]}"


def test_most_families_are_tried():
    assert sum(" right " in row or " refused" in row for row in ROWS.values()) > 150


@pytest.mark.parametrize("kind", [CLIPConfig, ViTConfig, Wav2Vec2Config])
def test_models_that_keep_no_cache_are_refused(kind):
    with pytest.raises(ValueError, match=f"{kind.model_type} model takes no DynamicCache"):
        TurboQuantCache(kind())
