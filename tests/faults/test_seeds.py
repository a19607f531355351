"""A seed gives the same image alone or in a batch, in any order, and on one device or on two."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from benchmarks.forked import run, run_ranks


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


PROMPTS = [
    {"prompt": "a red circle on a blue background", "seed": 5},
    {"prompt": "a small green star, " * 30, "seed": 6},  # of more than 77 tokens
    {"prompt": "a (blue:1.2) heart", "negative_prompt": "red", "seed": 7},
    {"prompt": "", "seed": 8},
    {"prompt": "a yellow square", "seed": 2**40},
]


@pytest.fixture(scope="module")
def sample(checkpoint, tmp_path_factory):
    """A function that samples the prompts with some settings; returns the images by prompt and seed."""

    def sample(
        *settings: str, order: Sequence[int] = (0, 1, 2, 3, 4), processes: int = 1
    ) -> dict[tuple[str, int], np.ndarray]:
        folder = tmp_path_factory.mktemp("seeds")
        lines = [json.dumps(PROMPTS[k]) + "\n" for k in order]
        (folder / "prompts.jsonl").write_text("".join(lines))
        arguments = [f"prompts={folder / 'prompts.jsonl'}", "num_images_per_prompt=2", f"pretrained={checkpoint}"]
        arguments += ["steps=4", "sampler=euler_a", f"output_dir={folder / 'out'}", *settings]
        (run if processes == 1 else run_ranks)("predict", *arguments, log=folder / "log")
        records = map(json.loads, (folder / "out" / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
        return {
            (record["prompt"], record["seed"]): np.asarray(Image.open(folder / "out" / record["file"])).astype(int)
            for record in records
        }

    return sample


@pytest.fixture(scope="module")
def one_by_one(sample):
    return sample("batch_size=1")


WAYS = {
    "two in a batch": {"settings": ["batch_size=2"]},
    "three in a batch": {"settings": ["batch_size=3"]},
    "eight in a batch": {"settings": ["batch_size=8"]},
    "in another order": {"settings": ["batch_size=3"], "order": [4, 2, 0, 3, 1]},
    "without a progress bar": {"settings": ["progress=false", "batch_size=1"]},
    "in two processes": {"settings": ["batch_size=2"], "processes": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_seed_gives_the_same_image(sample, one_by_one, way):
    settings = dict(WAYS[way])
    images = sample(*settings.pop("settings"), **settings)
    assert len(images) == 2 * len(settings.get("order", PROMPTS))
    differences = [np.abs(image - one_by_one[name]).max() for name, image in images.items()]
    assert max(differences) <= 1


def test_a_compiled_model_gives_the_same_image(sample):
    eager, compiled = (
        sample("batch_size=1", more, order=[0, 2]) for more in ("speed.compile=none", "speed.compile=blocks")
    )
    assert len(compiled) == 4 and compiled.keys() == eager.keys()
    assert max(np.abs(image - eager[name]).max() for name, image in compiled.items()) <= 1
