"""What differs between families is said in ``families/``: no other folder asks which family a checkpoint is of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sdmodule.families.recognize import FAMILIES

PACKAGE = Path(__file__).parents[2] / "sdmodule"
ROOMS = {"families", "conf"}
FAMILY_NAMES = "|".join(["Family", *(type(family).__name__ for family in FAMILIES)])
ASKS = re.compile(rf"sdxl|isinstance\([^)]*\b({FAMILY_NAMES})\b|\.family (is|==)", re.IGNORECASE)


def test_no_other_folder_asks_for_the_family():
    files = [path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] not in ROOMS]
    assert len(files) > 100
    assert [str(path) for path in files if ASKS.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "LatentDiffusionPipeline"])
def test_a_pipeline_is_of_one_family(name):
    assert len([family for family in FAMILIES if family.recognizes({"_class_name": name})]) == 1
