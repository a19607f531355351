"""Row 16: a training resumed with other batches goes on at the same place of the epoch: no image twice, none lost."""

from __future__ import annotations

import pytest
import torch

from sdmodule.cli.main import train_main
from sdmodule.data.sampler import ShuffleByEpoch
from tests.reported.drawing import numbered

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


@pytest.fixture
def run(call, checkpoint, tmp_path):
    """Train on eight images and return the captions of each step."""
    folder, log = numbered(tmp_path / "photos", 8), tmp_path / "captions"
    common = [f"pretrained={checkpoint}", f"data.root={folder}", "resolution=32", "data.val_fraction=0"]
    common += ["callbacks=[checkpoint]", "validate_first=false", f"output_dir={tmp_path / 'out'}"]
    common += [f"+callbacks.seen={{_target_: tests.reported.watching.Captions, file: {log}}}"]

    def train(*settings: str) -> list[list[str]]:
        log.unlink(missing_ok=True)
        status, _, errors = call(train_main, *common, *settings)
        assert status == 0, errors
        steps: dict[str, list[str]] = {}
        for line in log.read_text().splitlines():
            step, *captions = line.split()
            steps.setdefault(step, []).extend(captions)
        return list(steps.values())

    return train


ALL = {f"p{k}" for k in range(8)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("data.batch_size=2",), ("data.batch_size=1", "trainer.accumulate_grad_batches=2")),
        (("data.batch_size=1",), ("data.batch_size=2",)),
        (("data.batch_size=1", "trainer.accumulate_grad_batches=2"), ("data.batch_size=1",)),
    ],
)
def test_the_images_that_are_left_of_the_epoch_come_first(run, before, after):
    first = run(*before, "trainer.max_steps=2")
    seen = [caption for step in first for caption in step]
    size = 2 if "trainer.accumulate_grad_batches=2" in after or "data.batch_size=2" in after else 1
    left = 8 - len(seen)
    resumed = run(*after, f"trainer.max_steps={2 + left // size + 2}", "ckpt_path=last")
    epoch = [caption for step in resumed[: left // size] for caption in step]
    assert sorted(seen + epoch) == sorted(ALL)
    assert all(len(step) == size for step in resumed), resumed
    following = [caption for step in resumed[left // size :] for caption in step]
    assert len(set(following)) == len(following) == 2 * size


def test_the_same_batches_are_resumed_to_the_bit_as_before(run, tmp_path):
    run("data.batch_size=2", "trainer.max_steps=3")
    steps = run("data.batch_size=2", "trainer.max_steps=6", "ckpt_path=last")
    last = torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    straight = run("data.batch_size=2", "trainer.max_steps=6", f"output_dir={tmp_path / 'straight'}")
    whole = torch.load(tmp_path / "straight" / "checkpoints" / "last.ckpt", weights_only=True)
    assert steps == straight[3:]
    assert all(torch.equal(value, last["state_dict"][name]) for name, value in whole["state_dict"].items())


def test_with_buckets_it_is_said_that_the_epoch_starts_over(run):
    run("data.batch_size=2", "data.buckets=true", "trainer.max_steps=1")
    with pytest.warns(UserWarning, match=r"was 2 images over all devices, and is 4; .* this epoch starts over"):
        steps = run("data.batch_size=4", "data.buckets=true", "trainer.max_steps=3", "ckpt_path=last")
    assert {caption for step in steps for caption in step} == ALL


@pytest.mark.parametrize("devices", [1, 2, 3])
@pytest.mark.parametrize(("count", "seen", "size"), [(8, 6, 1), (10, 3, 4), (10, 4, 2), (9, 6, 4), (7, 6, 4)])
def test_ranks_share_what_is_left(count, seen, size, devices):
    shown = []
    for rank in range(devices):
        sampler = ShuffleByEpoch(range(count), size, devices, rank)
        sampler.seen = seen
        shown.append(list(sampler))
    assert len({len(part) for part in shown}) == 1, "every rank has as many"
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    together = [index for part in shown for index in part]
    assert len(set(together)) == len(together) and set(together) <= set(order[seen:])
    whole = min((count - seen) // devices * devices, sampler.batches * sampler.global_batch_size)
    assert len(together) == whole
