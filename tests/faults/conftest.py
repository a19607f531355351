"""Images for the tests of crashes, full disks and bad files."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from sdmodule.data.toy.scenes import caption, render, sample_scene

SHAPES = [(40, 40), (64, 32), (32, 64)]


def write_scenes(folder: Path, count: int) -> Path:
    """Write images of three shapes, with captions of three tags."""
    folder.mkdir(exist_ok=True)
    for k in range(count):
        scene = sample_scene(random.Random(k))
        render(scene, 64).resize(SHAPES[k % 3]).save(folder / f"{k:03}.png")
        (folder / f"{k:03}.txt").write_text(caption(scene) + ", an image, of shapes")
    return folder


@pytest.fixture(scope="session")
def scene_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen images of three shapes."""
    return write_scenes(tmp_path_factory.mktemp("scenes"), 15)
