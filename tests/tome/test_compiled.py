"""A merged UNet compiles as one graph, once for all steps."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch._dynamo.testing import CompileCounter

from sdmodule.tome.apply import apply_merging
from sdmodule.tome.token_merging import TokenMerging
from tests.tome.conftest import small_unet

CASES = [{"engine": "exact"}, {"engine": "window", "merge_crossattn": True, "merge_mlp": True}]
ONE_BLOCK = {"channels": (32,), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
"""Settings of a UNet with one transformer block."""


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "dtype"), [(CASES[0], torch.float32), (CASES[1], torch.float32), (CASES[1], torch.bfloat16)]
)
def test_a_unet_is_one_graph_for_ten_steps(inputs, settings, dtype):
    latents, _, text = inputs
    unet, latents, text = small_unet(mid_block_type=None).to(dtype), latents.to(dtype), text.to(dtype)
    graphs = CompileCounter()
    compiled = torch.compile(unet, backend=graphs, fullgraph=True)
    with apply_merging(unet, TokenMerging(max_downsample=2, **settings), steps=10) as start_step, torch.no_grad():
        for step in range(10):
            start_step(step)
            timestep = torch.tensor(900 - 50 * step)
            merged = compiled(latents, timestep, text).sample
            if dtype == torch.float32:  # in bfloat16 eager attention may be another kernel
                assert torch.equal(merged, unet(latents, timestep, text).sample)
    assert graphs.frame_count == 1


@pytest.mark.slow
@pytest.mark.parametrize("settings", CASES)
def test_compiled_blocks_match_eager_ones(inputs, settings):
    """Block by block: compiling a whole UNet takes minutes, and each block as long as any other."""
    unet = small_unet(**ONE_BLOCK)
    with apply_merging(unet, TokenMerging(**settings)), torch.no_grad():
        eager = unet(*inputs).sample
        blocks = [module for module in unet.modules() if hasattr(module, "merging")]
        assert blocks
        for block in blocks:
            block.compile(fullgraph=True)
        assert torch.allclose(unet(*inputs).sample, eager, atol=1e-4)


@pytest.mark.slow
def test_blocks_compiled_before_merging_are_merged_and_restored(inputs):
    unet = small_unet(**ONE_BLOCK)
    with torch.no_grad():
        plain = unet(*inputs).sample
        with apply_merging(unet, TokenMerging()):
            merged = unet(*inputs).sample
        for module in unet.modules():
            if isinstance(module, Transformer2DModel):
                module.compile(backend="aot_eager", dynamic=False)
        assert torch.equal(unet(*inputs).sample, plain)
        with apply_merging(unet, TokenMerging()):
            assert torch.equal(unet(*inputs).sample, merged)
        assert torch.equal(unet(*inputs).sample, plain)
