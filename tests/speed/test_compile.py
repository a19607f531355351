"""A UNet compiled for training has the gradients of an eager one."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.upsampling import Upsample2D

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
def test_a_unet_compiled_as_a_whole_learns_below_its_upsampling():
    """With torch's own compiler, in half a minute: with diffusers' upsampling these gradients are 0 in bfloat16."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        mid_block_type=None,
        layers_per_block=1,
        norm_num_groups=4,
    )
    expected = gradients(unet)
    compile_unet(unet, "whole")
    assert type(unet.up_blocks[0].upsamplers[0]) is DoublingUpsample2D
    for name, gradient in gradients(unet).items():
        assert (gradient - expected[name]).norm() < 0.3 * expected[name].norm(), name  # 0 would miss all of it


def gradients(unet):
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.zeros(2, 1, 8)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(latents, 5, encoder_hidden_states=text).sample
    unet.zero_grad()
    predicted.float().square().sum().backward()
    return {name: weight.grad.clone() for name, weight in unet.named_parameters()}


def test_an_unknown_value_is_an_error(checkpoint):
    with pytest.raises(SettingsError, match=r"training\.compile=all: unknown; choose one of blocks, none, whole"):
        StableDiffusionModule(str(checkpoint), training={"compile": "all"})
