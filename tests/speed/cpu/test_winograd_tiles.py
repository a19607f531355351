"""Winograd's F(4x4, 3x3): equal to direct convolutions in float32 but for rounding, where it applies."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdmodule.speed.cpu import layers, winograd_tiles
from sdmodule.speed.cpu.kernels import fastest_convolutions
from sdmodule.speed.cpu.layers import FastestConv2d, winograd_tiles_convolution
from sdmodule.speed.cpu.prepacked import supports_prepacking
from sdmodule.speed.cpu.winograd_tiles import applies_to
from sdmodule.speed.swap_class import swap_class

pytestmark = pytest.mark.skipif(not supports_prepacking(torch.float32), reason="oneDNN is not in this build of torch")


def image(height=32, width=32, batch=2):
    return torch.randn(batch, 16, height, width, generator=torch.Generator().manual_seed(height))


def convolution(**settings):
    torch.manual_seed(0)
    return nn.Conv2d(16, 32, **{"kernel_size": 3, "padding": 1, **settings})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tiles", [winograd_tiles.MAX_TILES, 24, 1])  # one strip, several and a rest, one per row
@torch.no_grad()
def test_the_relative_error_is_below_5e_6(bias, tiles, monkeypatch):
    monkeypatch.setattr(winograd_tiles, "MAX_TILES", tiles)
    layer, exact = convolution(bias=bias), convolution(bias=bias).double()
    with swap_class(FastestConv2d, [layer], keeps=("matrices",)):
        for given in (image(), image(36, 32), image(4, 256), image(256, 4, batch=1)):
            for laid in (given, given.contiguous(memory_format=torch.channels_last)):
                wanted = exact(laid.double())
                found = winograd_tiles_convolution(laid, layer)
                assert found.is_contiguous(memory_format=torch.channels_last)
                assert (found - wanted).norm() < 5e-6 * wanted.norm()


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch():
    layer, given = convolution(), image(batch=3)
    with swap_class(FastestConv2d, [layer], keeps=("matrices",)):
        together = winograd_tiles_convolution(given, layer)
        assert torch.equal(winograd_tiles_convolution(given[1:2], layer), together[1:2])


@pytest.fixture
def tiles_everywhere(monkeypatch):
    """Runs the last kernel of every layer."""
    monkeypatch.setattr(layers, "fastest", lambda kernels, shape, *inputs: list(kernels.values())[-1](*inputs))


OTHERS = [
    ({"stride": 2}, image()),
    ({"kernel_size": 1, "padding": 0}, image()),
    ({"dilation": 2, "padding": 2}, image()),
    ({"groups": 4}, image()),
    ({}, image(28, 32)),  # too small
    ({}, image(34, 32)),  # not divisible into tiles
    ({}, image(32, 38)),
]


@pytest.mark.parametrize(("settings", "given"), OTHERS, ids=lambda value: str(getattr(value, "shape", value)))
@torch.no_grad()
def test_other_convolutions_are_unchanged(settings, given, tiles_everywhere):
    layer = convolution(**settings)
    wanted = layer(given)
    assert not applies_to(layer, given)
    with fastest_convolutions(layer):
        torch.testing.assert_close(layer(given), wanted)
        assert "matrices" not in vars(layer)


def test_it_does_not_apply_in_16_bits():
    assert applies_to(convolution(), image())
    assert not applies_to(convolution().bfloat16(), image().bfloat16())


@pytest.fixture
def medium_products():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@torch.no_grad()
def test_it_does_not_apply_where_float32_products_may_be_rounded(medium_products, tiles_everywhere):
    layer, given = convolution(), image()
    assert not applies_to(layer, given)
    with fastest_convolutions(layer):
        found = layer(given)
    wanted = layer.double()(given.double())
    assert (found - wanted).norm() < 5e-6 * wanted.norm()


@torch.no_grad()
def test_it_does_not_depend_on_the_default_dtype():
    layer, given = convolution(), image()
    wanted = winograd_tiles.convolve(given, winograd_tiles.transform_weights(layer), layer.bias)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(winograd_tiles.convolve(given, winograd_tiles.transform_weights(layer), layer.bias), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def test_training_drops_cached_weights(tiles_everywhere):
    layer, given = convolution(), image()
    with fastest_convolutions(layer):
        with torch.no_grad():
            layer(given)
        assert "matrices" in vars(layer)
        layer(given).square().sum().backward()
        with torch.no_grad():
            layer.weight -= 0.01 * layer.weight.grad.sign()
            torch.testing.assert_close(layer(given), layer._conv_forward(given, layer.weight, layer.bias))
    assert not {"matrices", "packed", "rows"} & set(vars(layer))
    assert type(layer) is nn.Conv2d
