"""The table of diffusers' arguments names all of them, and what is named in it exists."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import diffusers
import pytest
from omegaconf import OmegaConf

from sdmodule.sampling.infer import InferOptions, infer

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "diffusers_arguments.md"
KINDS = ("", "Img2Img", "Inpaint", "ControlNet", "Adapter")
PIPELINES = [getattr(diffusers, f"StableDiffusion{xl}{kind}Pipeline") for xl in ("", "XL") for kind in KINDS]

pytestmark = pytest.mark.docs


def rows() -> list[list[str]]:
    """The cells of both tables, without their heads."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_argument_is_in_the_table_or_left_out():
    theirs = {name for kind in PIPELINES for name in inspect.signature(kind.__call__).parameters} - {"self", "kwargs"}
    assert sorted(name for row in rows() for name in names(row[0])) == sorted(theirs)


def test_what_the_table_names_exists():
    ours = {*inspect.signature(infer).parameters, *InferOptions.__annotations__}
    conf = PAGE.parents[2] / "conf"
    predict, sampler = (OmegaConf.load(conf / name) for name in ("predict.yaml", "sampler/checkpoint.yaml"))
    for row in rows():
        if len(row) < 4:
            continue
        assert set(names(row[1])) <= ours, row
        for key in names(row[2]):
            group, _, name = key.rpartition(".")
            assert key in predict or key == "seed" or (group == "sampler" and name in sampler), row
