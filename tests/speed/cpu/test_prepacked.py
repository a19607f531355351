"""Prepacked weights: equal results, and plain layers again afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from torch import nn

from sdmodule.speed.cpu import layers
from sdmodule.speed.cpu.kernels import fastest_kernels, fastest_linears
from sdmodule.speed.cpu.layers import FastestConv2d, FastestGEGLU
from sdmodule.speed.cpu.prepacked import fused_geglu, prepacked_convolution, supports_prepacking
from sdmodule.speed.swap_class import swap_class

pytestmark = pytest.mark.skipif(not supports_prepacking(torch.bfloat16), reason="oneDNN has no bfloat16 here")

SIZE = (2, 16, 12, 10)
SETTINGS = [{"padding": 1}, {"padding": 1, "stride": 2}, {"bias": False}, {"groups": 4, "dilation": 2}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@torch.no_grad()
def test_a_prepacked_convolution_matches_torch(settings):
    layer = nn.Conv2d(16, 32, 3, **settings).bfloat16()
    for size in (SIZE, (1, 16, 12, 10), (2, 16, 9, 7)):  # the weights are prepacked for the first size
        image = torch.randn(size).bfloat16().contiguous(memory_format=torch.channels_last)
        expected = layer(image)
        with swap_class(FastestConv2d, [layer], keeps=("packed",)):
            prepacked_convolution(torch.randn(SIZE).bfloat16(), layer)
            assert layer.packed is not None
            torch.testing.assert_close(prepacked_convolution(image, layer), expected)
        assert torch.equal(layer(image), expected)


@pytest.fixture
def every_kernel(monkeypatch):
    """Runs every kernel of every layer, so that each caches its weights."""

    def run_all(kernels, shape, *inputs):
        return [kernel(*inputs) for kernel in kernels.values()][-1]

    monkeypatch.setattr(layers, "fastest", run_all)


def cached(unet):
    found = [(name, vars(part).get(name)) for part in unet.modules() for name in ("packed", "rows", "halves")]
    return {name for name, value in found if value is not None}


def test_no_cached_weight_is_left_afterwards(module, every_kernel):
    unet = module.unet.bfloat16()
    before = {name: set(vars(part)) for name, part in unet.named_modules()}
    with torch.no_grad(), pytest.raises(RuntimeError, match="stop"), fastest_kernels(unet):
        call(unet)
        assert cached(unet) == {"packed", "rows", "halves"}
        raise RuntimeError("stop")
    assert {name: set(vars(part)) for name, part in unet.named_modules()} == before
    assert not any(isinstance(part, FastestConv2d) for part in unet.modules())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_autocast_works_with_weights_of_either_dtype(module, weights):
    unet = module.unet.to(weights)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = call(unet)
        with fastest_kernels(unet):
            assert (call(unet) - expected).norm() < 0.02 * expected.norm()


def test_training_drops_cached_weights(module, every_kernel):
    unet = module.unet.bfloat16().requires_grad_()
    with fastest_kernels(unet):
        with torch.no_grad():
            call(unet)
        call(unet).square().sum().backward()
        with torch.no_grad():
            for weight in unet.parameters():
                weight -= 0.01 * weight.grad.sign()
            found = call(unet)
    with torch.no_grad(), fastest_kernels(unet):
        assert torch.equal(call(unet), found)


def test_gradients_are_those_of_torch(module):
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


@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_fused_geglu_rounds_less_than_torch(bias):
    layer, tokens = GEGLU(16, 24, bias=bias).bfloat16(), torch.randn(2, 30, 16).bfloat16()
    exact = copy.deepcopy(layer).double()(tokens.double())
    theirs = (layer(tokens).double() - exact).norm()
    with fastest_linears([nn.ModuleList([layer])]):
        assert type(layer) is FastestGEGLU
        for batch in (tokens, tokens[:1]):  # weights prepacked for two rows work for one
            assert (fused_geglu(batch, layer).double() - exact[: len(batch)]).norm() < theirs


@torch.no_grad()
def test_a_hook_on_the_projection_still_runs(monkeypatch):
    layer, tokens, seen = GEGLU(16, 24).bfloat16(), torch.randn(2, 30, 16).bfloat16(), []
    layer.proj.register_forward_hook(lambda *_: seen.append(1))
    monkeypatch.setattr(layers, "fastest", lambda kernels, shape, *inputs: list(kernels.values())[-1](*inputs))
    with fastest_linears([nn.ModuleList([layer])]):
        layer(tokens)
    assert seen == [1]
