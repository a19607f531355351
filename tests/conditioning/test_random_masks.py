import torch

from sdmodule.conditioning.random_masks import draw_masks


def draw(count: int, size: tuple[int, int] = (64, 64), whole: float = 0.0, seed: int = 0) -> torch.Tensor:
    return draw_masks(count, size, whole, torch.Generator().manual_seed(seed))


def test_a_mask_is_hard_never_empty_and_never_whole_unless_asked_for() -> None:
    for size in ((64, 64), (32, 48), (512, 640)):
        masks = draw(40, size)
        assert masks.shape == (40, 1, *size)
        assert set(masks.unique().tolist()) == {0.0, 1.0}
        covered = masks.mean(dim=(1, 2, 3))
        assert covered.min() > 0 and covered.max() < 1


def test_a_quarter_of_everything_is_a_quarter() -> None:
    whole = (draw(2000, (16, 16), whole=0.25).mean(dim=(1, 2, 3)) == 1).float().mean()
    assert 0.22 < whole < 0.28


def test_masks_grow_with_the_image() -> None:
    small, large = (draw(200, size).mean() for size in ((64, 64), (256, 256)))
    assert abs(small - large) < 0.02
    assert 0.2 < small < 0.4


def test_a_mask_depends_on_its_place_alone() -> None:
    assert torch.equal(draw(3), draw(8)[:3])
    assert not torch.equal(draw(3), draw(3, seed=1))
