"""Winograd's F(2, 3): equal to direct convolutions but for rounding, where it applies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdmodule.speed.cpu import layers
from sdmodule.speed.cpu.autotune import TORCH
from sdmodule.speed.cpu.layers import FastestConv2d, winograd_convolution
from sdmodule.speed.cpu.prepacked import supports_prepacking
from sdmodule.speed.cpu.winograd import applies_to
from sdmodule.speed.swap_class import swap_class

pytestmark = pytest.mark.skipif(not supports_prepacking(torch.bfloat16), reason="oneDNN has no bfloat16 here")


def image(height=12, width=10, batch=2):
    generator = torch.Generator().manual_seed(height)
    made = torch.randn(batch, 16, height, width, generator=generator).bfloat16()
    return made.contiguous(memory_format=torch.channels_last)


def convolution(**settings):
    torch.manual_seed(0)
    return nn.Conv2d(16, 32, **{"kernel_size": 3, "padding": 1, **settings}).bfloat16()


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_error_is_about_twice_that_of_a_direct_convolution(bias):
    layer = convolution(bias=bias)
    exact = convolution(bias=bias).double()
    with swap_class(FastestConv2d, [layer]):
        # the weights are prepacked for the first size
        for given in (image(), image(batch=1), image(2, 1), image(8, 7)):
            wanted = exact(given.double())
            direct = (nn.functional.conv2d(given, layer.weight, layer.bias, padding=1).double() - wanted).norm()
            found = winograd_convolution(given, layer)
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert (found.double() - wanted).norm() < 3 * direct


@torch.no_grad()
def test_in_float32_the_relative_error_is_below_1e_6():
    layer, given = convolution().float(), image().float()
    with swap_class(FastestConv2d, [layer], keeps=("rows",)):
        found = winograd_convolution(given, layer)
    wanted = layer.double()(given.double())
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    layer, given = convolution(), image(batch=3)
    with swap_class(FastestConv2d, [layer]):
        together = winograd_convolution(given, layer)
        assert torch.equal(winograd_convolution(given[1:2], layer), together[1:2])


@torch.no_grad()
def test_other_convolutions_are_unchanged(monkeypatch):

    def not_torch(kernels, shape, *inputs):
        return next(kernel for name, kernel in kernels.items() if name != TORCH)(*inputs)

    monkeypatch.setattr(layers, "fastest", not_torch)
    others = [{"stride": 2}, {"kernel_size": 1, "padding": 0}, {"dilation": 2, "padding": 2}, {"groups": 4}, {}]
    for settings in others:
        layer, given = convolution(**settings), image(12 if settings else 11)
        assert not applies_to(layer, given)
        wanted = layer(given)
        with swap_class(FastestConv2d, [layer], keeps=("packed", "rows")):
            torch.testing.assert_close(layer(given), wanted)
            assert layer.rows is None
