"""A training that goes on with other numbers of processes shows every image of an epoch once, in the same order."""

from __future__ import annotations

import io
import random
import tarfile
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from sdmodule.data.datamodule import ImageDataModule, ImageFolderDataModule, ShardsDataModule

COUNT = 24
SETTINGS: dict[str, Any] = {"resolution": 8, "val_fraction": 0, "center_crop": False, "random_flip": True, "seed": 3}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, str]:
    """The same images in a folder and in three tar shards."""
    root = tmp_path_factory.mktemp("elastic")
    (root / "folder").mkdir()
    for number in range(3):
        with tarfile.open(root / f"{number}.tar", "w") as tar:
            for k in range(8 * number, 8 * number + 8):
                file = io.BytesIO()
                shape = [(12, 12), (20, 10), (10, 20)][k % 3]
                Image.frombytes("RGB", shape, random.Random(k).randbytes(3 * shape[0] * shape[1])).save(file, "PNG")
                for name, content in ((f"{k:02}.png", file.getvalue()), (f"{k:02}.txt", f"{k}".encode())):
                    (root / "folder" / name).write_bytes(content)
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return {"folder": str(root / "folder"), "tar": f"{root}/{{0..2}}.tar"}


class Run:
    """A training of several ranks: their loaders, and how far each is, as Lightning records it.

    Args:
        kind: ``folder`` or ``tar``.
        source: where the images are.
        ranks: number of processes.
        batch_size: images of each in a batch.
        resume: the state of a run that this one resumes.
    """

    def __init__(
        self, kind: str, source: str, ranks: int, batch_size: int, resume: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        made = {"folder": ImageFolderDataModule, "tar": ShardsDataModule}[kind]
        self.ranks: list[tuple[ImageDataModule, Any]] = []
        for rank in range(ranks):
            data = made(source, batch_size=batch_size, **{**SETTINGS, **settings})
            current = SimpleNamespace(**dict.fromkeys(("ready", "started", "processed", "completed"), 0))
            progress = SimpleNamespace(current=current)
            loop = SimpleNamespace(restarting=resume is not None, epoch_loop=SimpleNamespace(batch_progress=progress))
            strategy = SimpleNamespace(root_device=SimpleNamespace(type="cpu"))
            trainer = SimpleNamespace(world_size=ranks, global_rank=rank, strategy=strategy, fit_loop=loop)
            trainer.current_epoch, trainer.accumulate_grad_batches = 0, 1
            data.trainer = trainer  # type: ignore[assignment]
            if resume:
                vars(current).update(dict.fromkeys(vars(current), resume["done"]))
                data.load_state_dict(resume["data"])
            data.setup()
            trainer.train_dataloader = data.train_dataloader()
            self.ranks.append((data, trainer))

    def batches(self, count: int | None = None) -> list[list[str]]:
        """The next global batches of the epoch, or all that are left, as captions with the sums of the pixels."""
        parts = []
        for data, trainer in self.ranks:
            own = []
            for batch in data.trainer.train_dataloader:
                own.append([f"{c} {x.double().sum():.3f}" for c, x in zip(batch["caption"], batch["image"])])
                current = trainer.fit_loop.epoch_loop.batch_progress.current
                vars(current).update(dict.fromkeys(vars(current), current.ready + 1))
                if len(own) == count:
                    break
            parts.append(own)
        assert len({len(own) for own in parts}) == 1, "every rank has as many batches"
        return [[one for places in zip(*batch, strict=True) for one in places] for batch in zip(*parts, strict=True)]

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds, which is the same on all ranks."""
        states = [
            {"done": trainer.fit_loop.epoch_loop.batch_progress.current.ready, "data": data.state_dict()}
            for data, trainer in self.ranks
        ]
        assert all(state == states[0] for state in states)
        return states[0]


def resumed(kind: str, sources: dict[str, str], phases: list[tuple[int, int, int | None]], **settings) -> list[str]:
    """Images shown in an epoch, in their order, of runs of so many ranks, with that batch size, for so many batches."""
    shown: list[str] = []
    state = None
    for ranks, batch_size, count in phases:
        run = Run(kind, sources[kind], ranks, batch_size, state, **settings)
        shown += [one for batch in run.batches(count) for one in batch]
        state = run.state()
    return shown


def captions(shown: list[str]) -> list[int]:
    return sorted(int(one.split()[0]) for one in shown)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_1_2_3_1_ranks_at_one_global_batch_show_what_one_rank_shows(sources, kind):
    shown = resumed(kind, sources, [(1, 6, 1), (2, 3, 1), (3, 2, 1), (1, 6, None)])
    assert captions(shown) == list(range(COUNT))
    assert shown == resumed(kind, sources, [(1, 6, None)])


def test_with_buckets_too(sources):
    phases = [(1, 2, 3), (2, 1, 4), (1, 2, None)]
    shown = resumed("folder", sources, phases, buckets=True)
    assert captions(shown) == list(range(COUNT))
    assert shown == resumed("tar", sources, [(1, 2, None)], buckets=True)


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize(
    "phases",
    [
        [(1, 6, 1), (2, 2, 1), (3, 1, 2), (1, 4, None)],
        [(1, 4, 1), (2, 1, 3), (2, 1, 1), (3, 4, None)],
        [(3, 3, 1), (1, 5, 1), (1, 5, 1), (1, 5, None)],
        [(1, 2, 3), (2, 2, 1), (2, 2, 1), (3, 1, 1), (1, 1, None)],
    ],
    ids=str,
)
def test_other_global_batches_show_every_image_once(sources, kind, phases):
    """Also when a run that was resumed with other batches is itself interrupted in the same epoch."""
    shown = resumed(kind, sources, phases)
    assert captions(shown) == list(range(COUNT))
    assert [one.split()[0] for one in shown] == [one.split()[0] for one in resumed(kind, sources, [(1, 1, None)])]
