"""Engine ``exact`` has the result of tomesd for the same draws."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from tomesd.merge import bipartite_soft_matching_random2d

from sdmodule.speed.attention import attention_backend
from sdmodule.speed.cpu import layers
from sdmodule.speed.cpu.autotune import TORCH
from sdmodule.speed.cpu.layers import FASTEST_ATTENTION, FastestGEGLU
from sdmodule.speed.layout import TokensInPlace
from sdmodule.tome import apply
from sdmodule.tome.apply import apply_merging
from sdmodule.tome.destinations import draw_destinations
from sdmodule.tome.exact import ExactMatching, sort_by_counting
from sdmodule.tome.merged_block import BlockMerging, MergedBlock
from sdmodule.tome.plan import Plan
from sdmodule.tome.token_merging import TokenMerging
from tests.tome.conftest import small_unet, tomesd_applied

GRIDS = [(16, 16), (33, 36), (7, 10)]
SWITCHES = [(True, False, False), (False, True, False), (False, False, True), (True, True, True), (True, False, True)]


def tokens(grid, channels=32, batch=2):
    return torch.randn(batch, grid[0] * grid[1], channels, generator=torch.Generator().manual_seed(2))


def matching(grid, ratio, stride, use_rand=True, seed=5):
    found = ExactMatching(grid, ratio, stride, stride)
    found.use(draw_destinations([grid], [seed], 1, stride, stride, use_rand)[0][0])
    return found


@pytest.mark.parametrize("use_rand", [True, False])
@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.75])
def test_merging_and_unmerging_match_tomesd(ratio, grid, stride, use_rand):
    x = tokens(grid)
    merge, unmerge = bipartite_soft_matching_random2d(
        x,
        grid[1],
        grid[0],
        stride,
        stride,
        int(x.shape[1] * ratio),
        no_rand=not use_rand,
        generator=torch.Generator().manual_seed(5),
    )
    found = matching(grid, ratio, stride, use_rand)
    plan = Plan.of(found.positions(x), found.merged)
    merged = merge(x)
    assert plan.merge(x, 2).shape == merged.shape
    assert torch.allclose(plan.merge(x, 2), merged, rtol=0, atol=2e-6)
    assert torch.equal(plan.unmerge(merged, 2), unmerge(merged))


@pytest.mark.parametrize("switches", SWITCHES)
@pytest.mark.parametrize(("size", "stride"), [((16, 16), 2), ((33, 36), 3)])
def test_a_unet_matches_tomesd_at_every_step(unet, inputs, switches, size, stride):
    names = ("merge_attn", "merge_crossattn", "merge_mlp")
    settings = {"ratio": 0.5, "max_downsample": 2, "sx": stride, "sy": stride, **dict(zip(names, switches))}
    _, _, text = inputs
    steps = [torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    with torch.no_grad():
        with tomesd_applied(unet, seed=7, **settings):
            wanted = [unet(latents, 500, text).sample for latents in steps]
        with apply_merging(unet, TokenMerging(**settings), [7], size, steps=3) as start_step:
            for step, latents in enumerate(steps):
                start_step(step)
                assert torch.allclose(unet(latents, 500, text).sample, wanted[step], atol=1e-5)


@pytest.mark.slow
def test_a_block_of_stable_diffusion_matches_tomesd():
    """320 channels, 8 heads, text of 77 tokens of 768 channels; 64 x 64 tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = BasicTransformerBlock(320, 8, 40, cross_attention_dim=768).eval()
    grid = (64, 64)
    x, text = tokens(grid, 320), torch.randn(2, 77, 768, generator=torch.Generator().manual_seed(3))
    found = matching(grid, 0.5, 2)
    merge, unmerge = bipartite_soft_matching_random2d(x, 64, 64, 2, 2, 2048, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        wanted = unmerge(block.attn1(merge(block.norm1(x)))) + x
        wanted = block.attn2(block.norm2(wanted), encoder_hidden_states=text) + wanted
        wanted = block.ff(block.norm3(wanted)) + wanted
        block.__class__ = MergedBlock
        block.merging = BlockMerging(found, True, False, False, whole=False, keeps=False)
        assert torch.allclose(block(x, encoder_hidden_states=text), wanted, atol=1e-5)


def test_gradients_match_tomesd(inputs):
    latents, timestep, text = inputs
    grads = []
    for ours in (False, True):
        unet = small_unet().train()
        settings = {"ratio": 0.5, "max_downsample": 2, "merge_mlp": True}
        applied = (
            apply_merging(unet, TokenMerging(**settings), [7]) if ours else tomesd_applied(unet, seed=7, **settings)
        )
        with applied:
            unet(latents, timestep, text).sample.square().mean().backward()
        grads.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert torch.allclose(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    assert grads[1].abs().sum() > 0


@pytest.fixture
def in_bfloat16(unet, inputs):
    """UNet and inputs in bfloat16, with 16 x 16 tokens."""
    latents, timestep, text = inputs
    return unet.to(torch.bfloat16), (latents.bfloat16(), timestep, text.bfloat16())


@pytest.fixture
def tiles(monkeypatch):
    """Runs a kernel other than torch's, for few tokens too."""

    def not_torch(kernels, shape, *inputs):
        return next(kernel for name, kernel in kernels.items() if name != TORCH)(*inputs)

    monkeypatch.setattr(layers, "fastest", not_torch)
    monkeypatch.setattr(apply, "MANY_TOKENS", 0)


@pytest.mark.parametrize("engine", ["exact", "window"])
def test_in_bfloat16_merged_blocks_run_the_fastest_kernels(in_bfloat16, tiles, engine):
    unet, inputs = in_bfloat16
    before = unet.attn_processors
    with torch.no_grad():
        with apply_merging(unet, TokenMerging(engine=engine), [7]):
            blocks = [block for block in unet.modules() if isinstance(block, MergedBlock)]
            assert blocks and all(type(block.ff.net[0]) is FastestGEGLU for block in blocks)
            found = {name: processor is FASTEST_ATTENTION for name, processor in unet.attn_processors.items()}
            by_tiles = unet(*inputs).sample.float()
        assert unet.attn_processors == before
        with attention_backend("math", unet), apply_merging(unet, TokenMerging(engine=engine), [7]):
            by_torch = unet(*inputs).sample.float()
    assert any(found.values()) and not any(here for name, here in found.items() if "mid_block" in name)
    assert 0 < (by_tiles - by_torch).norm() < 0.05 * by_torch.norm()


def test_blocks_of_few_tokens_keep_torch_kernels(in_bfloat16, monkeypatch):
    unet, inputs = in_bfloat16
    monkeypatch.setattr(layers, "fastest", None)
    with apply_merging(unet, TokenMerging()), torch.no_grad():
        assert unet(*inputs).sample.isfinite().all()


def test_in_bfloat16_gradients_reach_the_attention_weights(in_bfloat16, tiles):
    unet, inputs = in_bfloat16
    with apply_merging(unet, TokenMerging(max_downsample=2)):
        unet(*inputs).sample.float().square().mean().backward()
    assert all(layer.weight.grad.abs().sum() > 0 for name, layer in unet.named_modules() if name.endswith("to_q"))


def test_an_attention_backend_asked_for_by_name_stays(in_bfloat16):
    unet, _ = in_bfloat16
    with attention_backend("math", unet):
        asked = unet.attn_processors
        with apply_merging(unet, TokenMerging()):
            assert unet.attn_processors == asked


def test_in_channels_last_transformers_keep_the_format(unet, inputs):
    with torch.no_grad():
        with apply_merging(unet, TokenMerging(), [7]):
            wanted = unet(*inputs).sample
        unet.to(memory_format=torch.channels_last)
        before = [type(part) for part in unet.modules()]
        with apply_merging(unet, TokenMerging(), [7]):
            assert any(isinstance(part, TokensInPlace) for part in unet.modules())
            seen = unet(*inputs).sample
    assert torch.allclose(seen, wanted, atol=1e-5)
    assert [type(part) for part in unet.modules()] == before


def test_sorted_segments_have_the_means_of_a_merge():
    """A GPU averages so, always in the same order."""
    x = tokens((12, 10))
    found = matching((12, 10), 0.5, 2, True)
    positions = found.positions(x)
    plan, sorted_plan = (Plan.of(positions, found.merged, by_segments=segments) for segments in (False, True))
    assert torch.allclose(sorted_plan.merge(x, 2), plan.merge(x, 2), rtol=0, atol=1e-6)
    half = sorted_plan.merge(x.half(), 2)  # summed in float32
    assert half.dtype == torch.float16 and torch.equal(half, sorted_plan.merge(x.half().float(), 2).half())


def test_counting_sorts_as_sorting_does():
    mask = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.25
    mask = mask.scatter(1, mask.int().argsort(dim=1, descending=True)[:, :2], True)
    order, place = sort_by_counting(mask)
    expected = mask.int().argsort(dim=1, descending=True, stable=True)
    assert torch.equal(order, expected) and torch.equal(place, expected.argsort(dim=1))
