"""Noise drawn ahead is that of drawing step by step, and leaves the generators where they would be."""

import pytest
import torch

from sdmodule.diffusion import step_noise
from sdmodule.diffusion.step_noise import NoiseAhead

SHAPE = (1, 4, 8, 8)


@pytest.mark.parametrize("upload", [2**28, 3 * 4 * 256 * 2])  # of all steps, or of two
@pytest.mark.parametrize("taken", [0, 3, 5])
@pytest.mark.parametrize("shared", [False, True], ids=["one each", "one for two"])
def test_noise_ahead_is_that_of_each_step(monkeypatch, upload, taken, shared):
    monkeypatch.setattr(step_noise, "LARGEST_UPLOAD", upload)

    def generators():
        first, second, third = (torch.Generator().manual_seed(seed) for seed in range(3))
        return [first, first if shared else second, third]

    drawing, expected = generators(), generators()
    noise = NoiseAhead(drawing, torch.device("cpu"), steps=5)
    for _ in range(taken):
        for one, other in zip(drawing, expected, strict=True):
            assert torch.equal(noise.draw(SHAPE, one, torch.float32), torch.randn(SHAPE, generator=other))
    noise.rewind()
    for one, other in zip(drawing, expected, strict=True):
        assert torch.equal(one.get_state(), other.get_state())
