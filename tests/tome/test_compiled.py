"""Merged UNets compile as one graph, once for all steps."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch._dynamo.testing import CompileCounter

from sdmodule.tome.settings import TokenMerging

CASES = [{"engine": "exact"}, {"engine": "window"}, {"engine": "window", "merge_crossattn": True, "merge_mlp": True}]


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", CASES)
def test_a_unet_is_one_graph_for_ten_steps(unet, inputs, settings, dtype):
    latents, _, text = inputs
    unet, latents, text = unet.to(dtype), latents.to(dtype), text.to(dtype)
    graphs = CompileCounter()
    compiled = torch.compile(unet, backend=graphs, fullgraph=True)
    with TokenMerging(max_downsample=2, **settings).applied(unet, steps=10) as start_step, torch.no_grad():
        for step in range(10):
            start_step(step)
            timestep = torch.tensor(900 - 50 * step)
            merged = compiled(latents, timestep, text).sample
            if dtype == torch.float32:  # in bfloat16 what is not compiled may have another attention
                assert torch.equal(merged, unet(latents, timestep, text).sample)
    assert graphs.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", CASES)
def test_compiled_to_machine_code_it_gives_the_same(unet, inputs, settings):
    """Block by block, as this package compiles: the whole of a UNet takes minutes."""
    with TokenMerging(**settings).applied(unet), torch.no_grad():
        eager = unet(*inputs).sample
        blocks = [module for module in unet.modules() if hasattr(module, "merging")]
        for block in blocks:
            block.compile(fullgraph=True)
        assert torch.allclose(unet(*inputs).sample, eager, atol=1e-4)


def test_blocks_compiled_before_merging_are_merged_and_give_back_the_plain_result(unet, inputs):
    with torch.no_grad():
        plain = unet(*inputs).sample
        with TokenMerging().applied(unet):
            merged = unet(*inputs).sample
        for module in unet.modules():
            if isinstance(module, Transformer2DModel):
                module.compile(backend="aot_eager", dynamic=False)
        assert torch.equal(unet(*inputs).sample, plain)
        with TokenMerging().applied(unet):
            assert torch.equal(unet(*inputs).sample, merged)
        assert torch.equal(unet(*inputs).sample, plain)
