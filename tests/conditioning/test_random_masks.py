"""Random masks for training are binary, of the right size, and reproducible."""

import torch

from sdmodule.conditioning.random_masks import draw_masks


def draw(count: int, size: tuple[int, int] = (64, 64), whole: float = 0.0, seed: int = 0) -> torch.Tensor:
    return draw_masks(count, size, whole, torch.Generator().manual_seed(seed))


def test_masks_are_binary_never_empty_and_never_whole_by_default() -> None:
    for size in ((64, 64), (32, 48), (512, 640)):
        masks = draw(40, size)
        assert masks.shape == (40, 1, *size)
        assert set(masks.unique().tolist()) == {0.0, 1.0}
        covered = masks.mean(dim=(1, 2, 3))
        assert covered.min() > 0 and covered.max() < 1


def test_whole_is_the_share_of_masks_that_cover_the_image() -> None:
    whole = (draw(2000, (16, 16), whole=0.25).mean(dim=(1, 2, 3)) == 1).float().mean()
    assert 0.22 < whole < 0.28


def test_masks_scale_with_the_image() -> None:
    small, large = (draw(200, size).mean() for size in ((64, 64), (256, 256)))
    assert abs(small - large) < 0.02
    assert 0.2 < small < 0.4


def test_a_mask_does_not_depend_on_the_number_of_masks() -> None:
    assert torch.equal(draw(3), draw(8)[:3])
    assert not torch.equal(draw(3), draw(3, seed=1))
