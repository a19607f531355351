"""Images of scenes, sets packed from them, and a server that gives them out."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.streaming import served
from sdmodule.data.streaming import remote

SHAPES = [(40, 40), (64, 32), (32, 64)]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Failed attempts follow one another at once."""
    monkeypatch.setattr(remote, "PAUSE", 0.01)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Twenty-four images of three shapes with captions."""
    from sdmodule.data.toy.scenes import caption, render, sample_scene

    folder = tmp_path_factory.mktemp("scenes")
    for k in range(24):
        scene = sample_scene(random.Random(k))
        render(scene, 64).resize(SHAPES[k % 3]).save(folder / f"{k:02}.png")
        (folder / f"{k:02}.txt").write_text(f"{caption(scene)}, number {k}")
    return folder


def call_pack(*arguments: object) -> None:
    """Pack in this process."""
    from sdmodule.cli.main import pack_main
    from tests.isolation import restored_messages

    before, sys.argv = sys.argv, ["pack", *map(str, arguments), "processes=0"]
    try:
        with restored_messages():
            pack_main()
    finally:
        sys.argv = before


@pytest.fixture(scope="session")
def packed(scenes, checkpoint, tmp_path_factory) -> Path:
    """All scenes in buckets, with latents, mirrored ones too, and text embeddings of the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("sets") / "packed"
    call_pack(
        f"data.root={scenes}",
        f"output_dir={folder}",
        f"pretrained={checkpoint}",
        "encode=all",
        "samples_per_shard=3",
        "data.val_fraction=0",
        "data.buckets=true",
        "data.random_flip=true",
    )
    return folder


@pytest.fixture(scope="session")
def plain(scenes, tmp_path_factory) -> Path:
    """The scenes as they are, an eighth of them for validation."""
    folder = tmp_path_factory.mktemp("sets") / "plain"
    call_pack(f"data.root={scenes}", f"output_dir={folder}", "samples_per_shard=3", "data.val_fraction=0.125")
    return folder


Serve = Callable[[Path], str]


@pytest.fixture
def serve(tmp_path) -> Iterator[Serve]:
    """Serve a folder; returns its address. The requests are in ``tmp_path / "requests"``."""
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield lambda folder: stack.enter_context(served(folder, tmp_path / "requests"))
