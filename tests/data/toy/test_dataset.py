"""Batches of scenes: image k is always the same, and the order is drawn from the seed."""

from __future__ import annotations

import pytest
import torch

from sdmodule.data.toy.dataset import ShapesDataModule, ShapesDataset
from sdmodule.data.toy.scenes import COLOURS


def captions(loader) -> list[str]:
    return [caption for batch in loader for caption in batch["caption"]]


def test_an_image_depends_on_seed_and_index_alone():
    long, short = ShapesDataset(100, seed=3, size=32), ShapesDataset(5, seed=3, size=32)
    assert long[4]["caption"] == short[4]["caption"] and torch.equal(long[4]["image"], short[4]["image"])
    assert not torch.equal(long[4]["image"], ShapesDataset(5, seed=4, size=32)[4]["image"])


def test_images_are_tensors_from_minus_one_to_one():
    example = ShapesDataset(20, size=32, two_objects=0.0)[0]
    assert example["image"].shape == (3, 32, 32) and example["image"].dtype == torch.float32
    assert -1 <= example["image"].min() < example["image"].max() <= 1
    background = example["caption"].split()[-2]
    corner = torch.tensor(COLOURS[background]) / 127.5 - 1
    torch.testing.assert_close(example["image"][:, 0, 0], corner, rtol=0, atol=1e-6)


def test_collages_have_no_caption():
    assert {ShapesDataset(10, size=16, collages=1.0)[k]["caption"] for k in range(10)} == {""}
    assert "" not in {ShapesDataset(10, size=16)[k]["caption"] for k in range(10)}


def test_an_epoch_shows_each_image_once_in_the_order_of_its_seed():
    data = ShapesDataModule(batch_size=4, train_length=16, size=16, seed=1)
    order = captions(data.train_dataloader())
    assert sorted(order) == sorted(example["caption"] for example in map(data.train_set.__getitem__, range(16)))
    assert order == captions(ShapesDataModule(batch_size=4, train_length=16, size=16, seed=1).train_dataloader())
    assert order != [data.train_set[k]["caption"] for k in range(16)]


def test_validation_shows_other_images_without_shuffling():
    data = ShapesDataModule(batch_size=4, train_length=6, val_length=6, size=16)
    assert captions(data.val_dataloader()) == [data.val_set[k]["caption"] for k in range(6)]
    assert captions(data.val_dataloader()) != [data.train_set[k]["caption"] for k in range(6)]


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_does_not_advance_the_global_rng(workers):
    data = ShapesDataModule(batch_size=2, train_length=4, val_length=2, size=16, num_workers=workers)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    captions(data.train_dataloader())
    captions(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)
