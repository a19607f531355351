"""A seed's image is the same however it is made: alone or among others, in any order, on one device or on two."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.forked import run

ROOT = Path(__file__).parents[2]
PROMPTS = [
    {"prompt": "a red circle on a blue background", "seed": 5},
    {"prompt": "a small green star, " * 30, "seed": 6},  # of more than 77 tokens
    {"prompt": "a (blue:1.2) heart", "negative_prompt": "red", "seed": 7},
    {"prompt": "", "seed": 8},
    {"prompt": "a yellow square", "seed": 2**40},
]


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """A function that makes the images with some settings, and returns them by prompt and seed."""

    def make(
        *settings: str, order: Sequence[int] = (0, 1, 2, 3, 4), processes: int = 1
    ) -> dict[tuple[str, int], np.ndarray]:
        folder = tmp_path_factory.mktemp("made")
        lines = [json.dumps(PROMPTS[k]) + "\n" for k in order]
        (folder / "prompts.jsonl").write_text("".join(lines))
        arguments = [f"prompts={folder / 'prompts.jsonl'}", "num_images_per_prompt=2", f"pretrained={checkpoint}"]
        arguments += ["steps=4", "sampler=euler_a", f"output_dir={folder / 'out'}", *settings]
        if processes == 1:
            run("predict", *arguments, said=folder / "said")
        else:
            arguments += [f"trainer.devices={processes}", "trainer.strategy=ddp"]
            command = [sys.executable, str(ROOT / "predict.py"), *arguments]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        records = map(json.loads, (folder / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
        return {
            (record["prompt"], record["seed"]): np.asarray(Image.open(folder / "out" / record["file"])).astype(int)
            for record in records
        }

    return make


@pytest.fixture(scope="module")
def one_by_one(made):
    return made("batch_size=1")


WAYS = {
    "two at once": {"settings": ["batch_size=2"]},
    "three at once": {"settings": ["batch_size=3"]},
    "eight at once": {"settings": ["batch_size=8"]},
    "in another order": {"settings": ["batch_size=3"], "order": [4, 2, 0, 3, 1]},
    "without a bar": {"settings": ["progress=false", "batch_size=1"]},
    "compiled": {"settings": ["speed.compile=blocks", "batch_size=1"], "order": [0, 2]},
    "by two processes": {"settings": ["batch_size=2"], "processes": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_an_image_is_the_same(made, one_by_one, way):
    settings = dict(WAYS[way])
    images = made(*settings.pop("settings"), **settings)
    assert len(images) == 2 * len(settings.get("order", PROMPTS))
    differences = [np.abs(image - one_by_one[name]).max() for name, image in images.items()]
    assert max(differences) <= 1
