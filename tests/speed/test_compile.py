"""A UNet compiled for training has the gradients of an eager one."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.speed.compile import DoublingUpsample2D, compile_unet


@pytest.mark.parametrize("size", [None, (16, 12), (15, 11)])
def test_repeated_pixels_equal_nearest_neighbor_interpolation(size):
    layer = Upsample2D(8, use_conv=True)
    image = torch.randn(2, 8, 8, 6, requires_grad=True)
    expected = layer(image, size)
    (gradient,) = torch.autograd.grad(expected.square().sum(), image)
    layer.__class__ = DoublingUpsample2D
    seen = layer(image, size)
    assert torch.equal(seen, expected)
    torch.testing.assert_close(torch.autograd.grad(seen.square().sum(), image)[0], gradient)


@pytest.mark.slow
def test_a_network_compiled_as_a_whole_learns_below_its_upsampling():
    """With torch's own compiler: with diffusers' upsampling these gradients are 0 in bfloat16."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        Upsample2D(8, use_conv=True),
        nn.SiLU(),
        nn.Conv2d(8, 4, 1),
    )
    expected = gradients(network)
    compile_unet(network, "whole")
    assert type(network[3]) is DoublingUpsample2D
    for name, gradient in gradients(network).items():
        assert (gradient - expected[name]).norm() < 0.3 * expected[name].norm(), name  # 0 would miss all of it


def gradients(network):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        predicted = network(latents)
    network.zero_grad()
    predicted.float().square().sum().backward()
    return {name: weight.grad.clone() for name, weight in network.named_parameters()}


def test_an_unknown_value_is_an_error(checkpoint):
    with pytest.raises(SettingsError, match=r"training\.compile=all: unknown; choose one of blocks, none, whole"):
        StableDiffusionModule(str(checkpoint), training={"compile": "all"})
