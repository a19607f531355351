"""Engine ``window`` merges tokens that are near and similar, and as many as asked for."""

from __future__ import annotations

import pytest
import torch

from sdmodule.tome.apply import apply_merging
from sdmodule.tome.blocks import transformer_blocks
from sdmodule.tome.destinations import destination_mask, draw_destinations
from sdmodule.tome.merged_block import BlockMerging
from sdmodule.tome.plan import Plan
from sdmodule.tome.token_merging import TokenMerging
from sdmodule.tome.window import WindowMatching


def plan_of(tokens, grid, ratio, stride=2, seed=0):
    matching = WindowMatching(grid, ratio, stride, stride)
    draws = draw_destinations([grid], [seed], 1, stride, stride, True)[0][0]
    matching.use(draws)
    return Plan.of(matching.positions(tokens), matching.merged), matching, destination_mask(draws, grid, stride, stride)


def brute_force(tokens, grid, gone, stay):
    """Groups of one image's tokens by definition, window by window and token by token; 2x2 cells."""
    h, w = grid
    groups = torch.arange(h * w)
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    for top in range(0, h - h % 4, 4):
        for left in range(0, w - w % 4, 4):
            window = [(top + y) * w + left + x for y in range(4) for x in range(4)]
            kept = [t for t in window if stay[t]]
            pairs = [max((float(unit[t] @ unit[k]), -k, t, k) for k in kept) for t in window if not stay[t]]
            for _, _, token, partner in sorted(pairs, reverse=True)[:gone]:
                groups[token] = partner
    return groups


@pytest.mark.parametrize("grid", [(8, 12), (9, 14)])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_merges_the_most_similar_pairs_of_each_window(ratio, grid):
    tokens = torch.randn(2, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(1))
    plan, _, stay = plan_of(tokens, grid, ratio)
    for image, rows in zip(tokens, plan.rows.view(2, -1)):
        groups = brute_force(image, grid, round(16 * ratio), stay[0])
        assert torch.equal(rows[:, None] == rows[None], groups[:, None] == groups[None])


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("grid", [(16, 16), (33, 36), (7, 10), (3, 3), (6, 3)])
def test_every_merged_token_is_the_mean_of_its_tokens(grid, stride):
    ratio = (1 - 1 / stride**2) if stride > 1 else 0.0
    tokens = torch.randn(2, grid[0] * grid[1], 8, generator=torch.Generator().manual_seed(1))
    plan, matching, _ = plan_of(tokens, grid, ratio, stride)
    merged = plan.merge(tokens, 2)
    assert merged.shape[1] == grid[0] * grid[1] - matching.windows * matching.removed
    assert plan.counts.sum() == 2 * grid[0] * grid[1] and plan.counts.min() >= 1
    back = plan.unmerge(merged, 2)
    assert torch.allclose(back.sum(dim=1), tokens.sum(dim=1), atol=1e-4)
    assert torch.allclose(plan.merge(back, 2), merged, atol=1e-5)  # equal tokens do not change


def test_equal_tokens_lose_nothing():
    tokens = torch.ones(1, 256, 8)
    plan, _, _ = plan_of(tokens, (16, 16), 0.75)
    assert torch.allclose(plan.unmerge(plan.merge(tokens, 1), 1), tokens)


def test_nans_come_out_as_they_went_in():
    tokens = torch.full((1, 256, 8), torch.nan)
    plan, _, _ = plan_of(tokens, (16, 16), 0.5)
    assert plan.unmerge(plan.merge(tokens, 1), 1).isnan().all()


def test_similar_neighbors_lose_little_and_whole_blocks_run_on_merged_tokens(unet, inputs):
    """Smooth latents, whose neighbors are similar as in real images."""
    latents, timestep, text = inputs
    smooth = torch.nn.functional.interpolate(latents[..., ::4, ::4], size=16, mode="bilinear")

    def output(ratio, whole):
        merging = TokenMerging(ratio=ratio, engine="window", merge_crossattn=whole, merge_mlp=whole)
        with apply_merging(unet, merging), torch.no_grad():
            return unet(smooth, timestep, text).sample

    plain = output(0.0, whole=False)
    for whole in (False, True):
        for ratio in (0.25, 0.5, 0.75):
            assert 0 < (output(ratio, whole) - plain).norm() / plain.norm() < 0.1
    sizes = []
    attention = next(module for name, module in unet.named_modules() if name.endswith("attn2"))
    hook = attention.register_forward_hook(lambda module, args, output: sizes.append(output.shape[1]))
    output(0.75, whole=True), output(0.75, whole=False)
    hook.remove()
    assert sizes == [64, 256]


def test_blocks_of_one_part_share_the_plan_of_the_first(unet, inputs):
    latents, timestep, text = inputs
    other = latents.flip(-1)
    with apply_merging(unet, TokenMerging(engine="window", max_downsample=2)), torch.no_grad():
        found = unet(other, timestep, text).sample
    with apply_merging(unet, TokenMerging(engine="window", max_downsample=2)), torch.no_grad():
        parts: dict[int, list[BlockMerging]] = {}
        for placed in transformer_blocks(unet):
            parts.setdefault(placed.part, []).append(placed.block.merging)
        for images in (latents, latents[:1], other):  # when guidance ends, and for other images
            merged = unet(images, timestep, text[: len(images)]).sample
            for first, *others in parts.values():
                h, w = first.matching.grid
                tokens = torch.randn(len(images), h * w, 4)
                assert all(merging.plan_for(tokens) is first.plan for merging in others)
        assert torch.equal(merged, found)
    assert any(len(merging) > 1 for merging in parts.values())


def test_a_block_whose_leader_is_skipped_makes_its_own_plan(unet, inputs):
    """With DeepCache, and when activation checkpointing calls a block again."""
    latents, timestep, text = inputs
    with apply_merging(unet, TokenMerging(engine="window", max_downsample=2), steps=2) as start_step:
        with torch.no_grad():
            unet(latents, timestep, text)
        follower = next(p.block.merging for p in transformer_blocks(unet) if p.block.merging.leader is not None)
        h, w = follower.matching.grid
        tokens = torch.randn(2, h * w, 4)
        assert follower.plan_for(tokens) is not follower.leader.plan  # with gradients
        start_step(1)
        with torch.no_grad():
            first = follower.plan_for(tokens)
            unet(latents.flip(0), timestep, text)
            start_step(1)
            assert torch.equal(follower.plan_for(tokens).rows, first.rows)
