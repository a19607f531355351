"""Token merging switched on for the length of a ``with`` block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import tomesd
import torch

from sdmodule.diffusion.upload import upload
from sdmodule.errors import SettingsError
from sdmodule.speed.cpu.kernels import fastest_blocks
from sdmodule.speed.layout import is_channels_last, tokens_in_place
from sdmodule.tome.blocks import Grid, PlacedBlock, blocks_to_merge
from sdmodule.tome.destinations import draw_destinations
from sdmodule.tome.exact import ExactMatching
from sdmodule.tome.merged_block import BlockMerging, MergedBlock
from sdmodule.tome.token_merging import TokenMerging
from sdmodule.tome.window import WindowMatching

StartStep = Callable[[int], None]
"""A function to call with the number of each step, from 0, before the step."""

MANY_TOKENS = 1024
"""Tokens from which a block's kernels are autotuned: the larger blocks of Stable Diffusion at 512 pixels."""


def noop_step(step: int) -> None:
    """The start-step function where steps do not differ, or where the engine counts them itself."""


def apply_merging(
    unet: Any, merging: TokenMerging, seeds: Sequence[int] = (0,), size: Grid | None = None, steps: int = 1
) -> AbstractContextManager[StartStep]:
    """Merge tokens inside a ``with`` block; afterwards the UNet is as it was, even after an error.

    The result depends on the seeds and on the step that was started last, not on the number of calls before.

    On CPU in bfloat16, large merged blocks run the fastest kernels of this machine whatever ``speed.kernels`` says (see
    `sdmodule.speed.cpu.kernels`); an attention backend that was asked for by name stays. Their weights must then not
    change inside the block, except by training. In channels_last the transformers keep that format. With engine
    ``window``, the blocks of one part of the UNet, whose tokens are similar, share the plan of the first.

    Args:
        unet: a ``UNet2DConditionModel``.
        merging: how to merge.
        seeds: one for each image of the batch, whose two halves under guidance share it, or a single one for all.
            Engine ``tomesd`` uses the first for all.
        size: height and width of the latents; the UNet's own if None.
        steps: number of steps to draw for.

    Returns:
        A context manager that yields a function to call before each step, with its number.

    Raises:
        SettingsError: as `TokenMerging.check` does.
    """
    if merging.ratio == 0:
        return nullcontext(noop_step)
    if any(type(module).__name__ == "ToMeBlock" for module in unet.modules()):
        raise SettingsError(
            "tome.ratio: the UNet is patched by tomesd already; call tomesd.remove_patch(unet), or leave tome out."
        )
    own = unet.config.sample_size
    size = size or ((own, own) if isinstance(own, int) else tuple(own))
    merging.check(unet, size)
    if merging.engine == "tomesd":
        return _merge_with_tomesd(unet, merging, seeds[0])
    return _merge(unet, merging, seeds, size, steps)


@contextmanager
def _merge(unet: Any, merging: TokenMerging, seeds: Sequence[int], size: Grid, steps: int) -> Iterator[StartStep]:
    """Merge with one of this package's engines."""
    pairs: list[tuple[PlacedBlock, ExactMatching | WindowMatching]] = []
    for placed in blocks_to_merge(unet, merging.max_downsample):
        kind = ExactMatching if merging.engine == "exact" else WindowMatching
        matching = kind(placed.grid(size), merging.ratio, merging.sx, merging.sy)
        if matching.removed:  # with few tokens a small ratio merges none
            pairs.append((placed, matching))
    grids = [matching.grid for _, matching in pairs]
    draws = [
        upload(drawn, unet.device)  # those of all steps, before the first
        for drawn in draw_destinations(grids, seeds, steps, merging.sx, merging.sy, merging.use_rand)
    ]

    def start_step(step: int) -> None:
        fresh = step % merging.reuse_steps == 0
        for (placed, matching), drawn in zip(pairs, draws, strict=True):
            placed.block.merging.fresh = fresh
            if fresh:
                placed.block.merging.plan = None  # DeepCache may skip a leader at this step
                matching.use(drawn[step])

    blocks = [placed.block for placed, _ in pairs]
    before = [(block.__class__, block.__dict__.get("merging")) for block in blocks]
    shares = merging.engine == "window"
    leaders: dict[int, BlockMerging] = {}
    try:
        for placed, matching in pairs:
            leader = leaders.get(placed.part)
            placed.block.merging = block_merging = BlockMerging(
                matching,
                merging.merge_attn,
                merging.merge_crossattn,
                merging.merge_mlp,
                merging.whole_block,
                keeps=merging.reuse_steps > 1 or (shares and leader is None),
                leader=leader,
            )
            if shares:
                leaders.setdefault(placed.part, block_merging)
            placed.block.__class__ = MergedBlock
        start_step(0)
        with ExitStack() as stack:
            if unet.device.type == "cpu" and unet.dtype == torch.bfloat16:
                large = [placed.block for placed, matching in pairs if math.prod(matching.grid) >= MANY_TOKENS]
                stack.enter_context(fastest_blocks(large))
            if is_channels_last(unet):
                stack.enter_context(tokens_in_place(unet))
            yield start_step
    finally:
        for block, (own_class, own_merging) in zip(blocks, before, strict=True):
            block.__class__ = own_class
            if own_merging is None:
                block.__dict__.pop("merging", None)
            else:
                block.merging = own_merging


@contextmanager
def _merge_with_tomesd(unet: Any, merging: TokenMerging, seed: int) -> Iterator[StartStep]:
    """Merge with the authors' package, unchanged.

    tomesd draws from a copy of torch's global generator, made at its first forward pass. The generator is seeded here
    and restored afterwards, so that an image depends on its seed and not on what was drawn before. tomesd draws at each
    call, so running the same steps again needs a new ``with`` block.
    """
    device = unet.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        tomesd.apply_patch(
            unet,
            ratio=merging.ratio,
            max_downsample=merging.for_unet(unet).max_downsample,
            sx=merging.sx,
            sy=merging.sy,
            use_rand=merging.use_rand,
            merge_attn=merging.merge_attn,
            merge_crossattn=merging.merge_crossattn,
            merge_mlp=merging.merge_mlp,
        )
        try:
            yield noop_step
        finally:
            tomesd.remove_patch(unet)
