"""Weights in order: the same results, by layers that are ordinary ones again afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdmodule.speed.kernels import fastest_kernels
from sdmodule.speed.packed import PackedConv2d, packed_convolutions, packs

pytestmark = pytest.mark.skipif(not packs(torch.bfloat16), reason="oneDNN has no bfloat16 on this processor")

SIZE = (2, 16, 12, 10)
SETTINGS = [{"padding": 1}, {"padding": 1, "stride": 2}, {"bias": False}, {"groups": 4, "dilation": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_a_convolution_gives_the_same(settings):
    layer = nn.Conv2d(16, 32, 3, **settings).bfloat16()
    for size in (SIZE, (1, 16, 12, 10), (2, 16, 9, 7)):  # of which the first decides the order of weights
        picture = torch.randn(size).bfloat16().contiguous(memory_format=torch.channels_last)
        expected = layer(picture)
        with packed_convolutions(layer):
            layer(torch.randn(SIZE).bfloat16())
            assert type(layer) is PackedConv2d and layer.packed is not None
            torch.testing.assert_close(layer(picture), expected)
        assert torch.equal(layer(picture), expected)


def test_afterwards_nothing_is_left(module):
    unet = module.unet.bfloat16()
    before = {name: set(vars(part)) for name, part in unet.named_modules()}
    with torch.no_grad(), pytest.raises(RuntimeError, match="stop"), fastest_kernels(unet):
        call(unet)
        assert any(type(part) is PackedConv2d and part.packed is not None for part in unet.modules())
        raise RuntimeError("stop")
    assert {name: set(vars(part)) for name, part in unet.named_modules()} == before
    assert not any(isinstance(part, PackedConv2d) for part in unet.modules())


def test_mixed_precision_has_weights_of_another_type(module):
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = call(module.unet)
        with fastest_kernels(module.unet):
            torch.testing.assert_close(call(module.unet), expected)


def test_where_gradients_are_wanted_they_come(module):
    unet = module.unet.bfloat16().requires_grad_()
    call(unet).square().sum().backward()
    expected = {name: weight.grad.clone() for name, weight in unet.named_parameters()}
    unet.zero_grad()
    with fastest_kernels(unet):
        call(unet).square().sum().backward()
    assert all(torch.equal(weight.grad, expected[name]) for name, weight in unet.named_parameters())


def call(unet):
    generator = torch.Generator().manual_seed(0)
    latents, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 7, 32, generator=generator)
    return unet(latents.to(unet.dtype), 3, encoder_hidden_states=text.to(unet.dtype)).sample
