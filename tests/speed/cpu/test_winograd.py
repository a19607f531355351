"""Convolutions with two thirds of the products: the same but for rounding, where they apply."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdmodule.speed.cpu import kernels
from sdmodule.speed.cpu.autotune import TORCH
from sdmodule.speed.cpu.kernels import FastestConv2d, winograd_convolution
from sdmodule.speed.cpu.prepacked import packs
from sdmodule.speed.cpu.winograd import is_ordinary
from sdmodule.speed.swap_class import swap_class

pytestmark = pytest.mark.skipif(not packs(torch.bfloat16), reason="oneDNN has no bfloat16 on this processor")


def image(height=12, width=10, batch=2):
    generator = torch.Generator().manual_seed(height)
    made = torch.randn(batch, 16, height, width, generator=generator).bfloat16()
    return made.contiguous(memory_format=torch.channels_last)


def convolution(**settings):
    torch.manual_seed(0)
    return nn.Conv2d(16, 32, **{"kernel_size": 3, "padding": 1, **settings}).bfloat16()


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_error_is_about_twice_that_of_an_ordinary_convolution(bias):
    layer = convolution(bias=bias)
    exact = convolution(bias=bias).double()
    with swap_class(FastestConv2d, [layer]):
        # the first decides the weights' order
        for given in (image(), image(batch=1), image(2, 1), image(8, 7)):
            wanted = exact(given.double())
            ordinary = (nn.functional.conv2d(given, layer.weight, layer.bias, padding=1).double() - wanted).norm()
            found = winograd_convolution(given, layer)
            assert found.is_contiguous(memory_format=torch.channels_last)
            assert (found.double() - wanted).norm() < 3 * ordinary


@torch.no_grad()
def test_in_float32_the_error_is_less_than_a_millionth():
    layer, given = convolution().float(), image().float()
    with swap_class(FastestConv2d, [layer], keeps=("rows",)):
        found = winograd_convolution(given, layer)
    wanted = layer.double()(given.double())
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


@torch.no_grad()
def test_an_image_is_the_same_whatever_its_batch():
    layer, given = convolution(), image(batch=3)
    with swap_class(FastestConv2d, [layer]):
        together = winograd_convolution(given, layer)
        assert torch.equal(winograd_convolution(given[1:2], layer), together[1:2])


@torch.no_grad()
def test_other_convolutions_are_as_they_were(monkeypatch):
    """As if it were the fastest wherever it is asked."""

    def other(ways, shape, *given):
        return next(way for name, way in ways.items() if name != TORCH)(*given)

    monkeypatch.setattr(kernels, "fastest", other)
    others = [{"stride": 2}, {"kernel_size": 1, "padding": 0}, {"dilation": 2, "padding": 2}, {"groups": 4}, {}]
    for settings in others:
        layer, given = convolution(**settings), image(12 if settings else 11)
        assert not is_ordinary(layer, given)
        wanted = layer(given)
        with swap_class(FastestConv2d, [layer], keeps=("packed", "rows")):
            torch.testing.assert_close(layer(given), wanted)
            assert layer.rows is None
