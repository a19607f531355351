"""One product for queries, keys and values."""

from __future__ import annotations

import pytest
import torch

from sdmodule.speed.cpu.layers import FastestLinear
from sdmodule.speed.fused_qkv import fused_qkv


def sampled(sd, **settings):
    return sd.infer(["a red circle", "a star"], num_inference_steps=2, return_type="latent", **settings)["samples"]


@pytest.mark.parametrize("settings", [{}, {"tome": {"engine": "window"}}, {"speed": {"attention": "math"}}])
def test_images_differ_by_rounding_only_and_the_model_is_as_before(few_blocks, settings):
    wanted, names = sampled(few_blocks, **settings), list(few_blocks.unet.state_dict())
    with fused_qkv(few_blocks.unet):
        found = sampled(few_blocks, **settings)
        assert any(name.endswith("attn1.qkv.weight") for name in few_blocks.unet.state_dict())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert list(few_blocks.unet.state_dict()) == names
    assert torch.equal(sampled(few_blocks, **settings), wanted)
    weights = [parameter.untyped_storage().data_ptr() for parameter in few_blocks.unet.parameters()]
    assert len(weights) == len(set(weights))  # safetensors writes no shared memory


def test_it_takes_no_memory_of_its_own(few_blocks):
    def held():
        storages = [parameter.untyped_storage() for parameter in few_blocks.unet.parameters()]
        return sum({one.data_ptr(): one.nbytes() for one in storages}.values())

    before = held()
    with fused_qkv(few_blocks.unet):
        assert held() == before


def test_a_layer_with_an_adapter_stays_as_it_is(few_blocks):
    attention = next(one for name, one in few_blocks.unet.named_modules() if name.endswith("attn1"))
    hook = attention.to_k.register_forward_hook(lambda layer, inputs, output: 2 * output)
    try:
        wanted = sampled(few_blocks)
        with fused_qkv(few_blocks.unet):
            assert not hasattr(attention, "qkv")
            torch.testing.assert_close(sampled(few_blocks), wanted, rtol=1e-3, atol=1e-4)
    finally:
        hook.remove()


def test_the_fastest_kernel_runs_for_the_joined_layer(few_blocks, monkeypatch):
    seen = set()
    forward = FastestLinear.forward
    monkeypatch.setattr(FastestLinear, "forward", lambda layer, x: seen.add(layer.out_features) or forward(layer, x))
    sampled(few_blocks, speed={"kernels": "fastest"})
    widths = {one.attn1.to_q.out_features for one in few_blocks.unet.modules() if hasattr(one, "attn1")}
    assert {3 * width for width in widths} <= seen
