"""Changes of training images leave what they show, and are the same from the same seed."""

from __future__ import annotations

import pytest
import torch

from sdmodule.training.image_variation import ImageVariation


def square(side: int = 32) -> torch.Tensor:
    """A white square in the middle, on black."""
    image = -torch.ones(4, 3, side, side)
    image[:, :, 12:20, 12:20] = 1
    return image


def changed(seed: int = 0, **settings: float) -> torch.Tensor:
    return ImageVariation(**settings)(square(), torch.Generator().manual_seed(seed))


def centre(images: torch.Tensor) -> torch.Tensor:
    """Row and column of the centre of what is bright, in each image."""
    weights = (images.mean(1) + 1) / 2
    grid = torch.stack(torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij"))
    return (weights[:, None] * grid).sum((2, 3)) / weights.sum((1, 2))[:, None]


def area(images: torch.Tensor) -> torch.Tensor:
    return (images.mean(1) + 1).sum((1, 2)) / 2


def test_nothing_changes_without_settings():
    assert torch.equal(changed(), square())


@pytest.mark.parametrize("name", ["shift", "scale", "blur", "colour", "noise"])
def test_each_image_changes_in_its_own_way_that_the_seed_decides(name):
    images = changed(**{name: 0.3})
    assert torch.equal(images, changed(**{name: 0.3}))
    assert not torch.equal(images, changed(1, **{name: 0.3}))
    assert not torch.equal(images[0], images[1]) or not torch.equal(images[1], images[2])
    assert images.min() >= -1 and images.max() <= 1


def test_a_shift_moves_and_a_scale_resizes_by_no_more_than_they_say():
    moved = centre(changed(shift=0.1)) - 15.5
    assert 0.5 < moved.abs().max() <= 3.2
    sizes = (area(changed(scale=0.25)) / 64).sqrt()
    assert 0.74 < sizes.min() < 0.95 or 1.05 < sizes.max()
    assert 0.74 < sizes.min() and sizes.max() < 1.26


def test_blur_and_noise_keep_the_mean_colours():
    torch.testing.assert_close(changed(blur=1.0).mean(), square().mean(), atol=0.01, rtol=0)
    noisy = -torch.zeros(2, 3, 64, 64)
    noisy = ImageVariation(noise=0.1)(noisy, torch.Generator().manual_seed(1))
    assert noisy.mean().abs() < 0.01 and 0 < noisy.std() <= 0.2
