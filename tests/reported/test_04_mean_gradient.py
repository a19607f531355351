"""Row 4: the gradient of a step is the mean over the images in it, however they are spread over batches and ranks."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from lightning import Trainer
from torch.utils.data import DataLoader

from benchmarks.forked import output_of
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.module import StableDiffusionModule
from sdmodule.training.optimizers import Optimization
from sdmodule.training.trainable import TrainableModule
from tests.fitting import fit
from tests.reported.drawing import numbered

pytestmark = pytest.mark.slow

LR = 1e-5


@pytest.fixture
def steady(checkpoint):
    """A module whose UNet answers 1000 whatever it sees: the gradient of ``conv_out.bias`` is about 500 per image."""
    module = StableDiffusionModule(
        str(checkpoint), optimizer=partial(torch.optim.SGD, lr=LR), objective={"caption_dropout": 0.0}
    )
    with torch.no_grad():
        module.unet.conv_out.weight.zero_()
        module.unet.conv_out.bias.fill_(1000.0)
    return module


@pytest.mark.parametrize(("images", "batch", "accumulate"), [(10, 1, 4), (1, 1, 4), (6, 2, 4), (8, 2, 2), (7, 1, 7)])
def test_every_step_counts_fully(steady, tmp_path, images, batch, accumulate):
    data = ImageFolderDataModule(str(numbered(tmp_path, images)), resolution=32, batch_size=batch, val_fraction=0)
    fit(steady, data, 3, accumulate_grad_batches=accumulate)
    expected = 1000.0
    for _ in range(3):
        expected -= LR * 2 * expected / 4
    assert torch.allclose(steady.unet.conv_out.bias, torch.tensor(expected), rtol=0, atol=2e-4)


class Mean(TrainableModule):
    """Its loss is ``w * x``, so that the gradient of ``w`` is the mean of the data in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.optimization = Optimization(partial(torch.optim.SGD, lr=1.0), None)
        self.seen: list[float] = []

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weighted((self.weight * batch).mean(), len(batch))

    def optimizer_step(self, *arguments, **options) -> None:
        super().optimizer_step(*arguments, **options)
        self.seen.append(float(self.weight.grad))


def run(loader, accumulate: int, kind: type[Mean] = Mean, **settings) -> list[float]:
    module = kind()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, accumulate_grad_batches=accumulate, **quiet, **settings
    )
    trainer.fit(module, loader)
    return module.seen


@pytest.mark.parametrize("accumulate", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 5, 8, 10])
def test_batches_of_unequal_size_are_weighted_by_their_images(batch, count, accumulate):
    values = torch.arange(1.0, count + 1)
    window = batch * accumulate
    wanted = [float(values[k : k + window].mean()) for k in range(0, count, window)]
    assert run(DataLoader(values, batch_size=batch), accumulate) == pytest.approx(wanted, rel=1e-6)


def test_batches_of_any_sizes_from_a_loader_that_does_not_say(tmp_path):
    batches = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0]), torch.tensor([5.0, 5.0]), torch.tensor([7.0])]
    loader = DataLoader(batches, batch_size=None)
    assert run(loader, 2) == pytest.approx([4.0, 17 / 3], rel=1e-6)


def test_regular_steps_are_lightnings_to_the_bit():
    values = torch.randn(12, generator=torch.Generator().manual_seed(0))

    class Plain(Mean):
        def weighted(self, loss, images):
            return loss

        def on_before_optimizer_step(self, optimizer):
            pass

    module = Plain()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_epochs=1, accelerator="cpu", logger=False, accumulate_grad_batches=2, **quiet)
    trainer.fit(module, DataLoader(values, batch_size=3))
    assert run(DataLoader(values, batch_size=3), 2) == module.seen


class OfRank(torch.utils.data.IterableDataset):
    """Another number of images on each rank."""

    def __iter__(self):
        rank = torch.distributed.get_rank()
        return iter([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])] if rank == 0 else [torch.tensor([10.0])] * 2)


class Telling(Mean):
    """Prints what it has seen, since the ranks are processes of their own."""

    def on_train_end(self) -> None:
        if self.global_rank == 0:
            print(json.dumps(self.seen), flush=True)


def on_two_ranks() -> None:
    run(DataLoader(OfRank(), batch_size=None), 2, Telling, strategy="ddp_fork", devices=2)


@pytest.mark.slow
def test_ranks_with_unequal_numbers_of_images(tmp_path):
    """Six images: 1, 2, 3 and 4 on one rank, 10 and 10 on the other."""
    lines = output_of(on_two_ranks, tmp_path / "log").splitlines()
    assert json.loads(lines[-1]) == pytest.approx([30 / 6])


def test_the_draws_of_a_step_differ_for_all_its_images():
    """Batches of unequal size do not share positions."""
    from types import SimpleNamespace

    from sdmodule.training.rng import per_example_generators

    trainer = SimpleNamespace(
        accumulate_grad_batches=2,
        world_size=1,
        global_rank=0,
        global_step=3,
        train_dataloader=SimpleNamespace(batch_size=4),
    )
    seeds = [each.initial_seed() for k, n in enumerate((4, 2)) for each in per_example_generators(0, n, k, trainer)]
    assert len(set(seeds)) == 6
