"""Switch token merging on for the length of a ``with`` block, and off without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import tomesd
import torch

from sdmodule.speed.cpu.kernels import fastest_blocks
from sdmodule.speed.layout import is_channels_last, tokens_in_place
from sdmodule.tome.blocks import Grid, PlacedBlock, blocks_to_merge
from sdmodule.tome.destinations import draw_destinations
from sdmodule.tome.exact import ExactMatching
from sdmodule.tome.merged_block import BlockMerging, MergedBlock
from sdmodule.tome.window import WindowMatching

if TYPE_CHECKING:
    from sdmodule.tome.settings import TokenMerging

StartStep = Callable[[int], None]
"""Told the number of a step before it, from 0."""


MANY = 1024
"""Tokens of a block whose layers are worth measuring: those of Stable Diffusion's larger blocks at 512 pixels."""


def noop_step(step: int) -> None:
    """What starts a step where steps do not differ, or where the engine counts them itself."""


@contextmanager
def merged(
    unet: Any, settings: TokenMerging, seeds: Sequence[int], size: Grid, steps: int
) -> Iterator[Callable[[int], None]]:
    """Merge by one of this package's engines; see ``TokenMerging.applied``.

    On CPU in bfloat16 the layers of large merged blocks are computed the way that is the fastest on this machine,
    whatever ``speed.kernels`` says, but for attention where torch's was asked for by name; weights must then not change
    meanwhile, unless by training. In channels_last the transformers leave tokens as they lie. Blocks of engine
    ``window`` in one part of the UNet, whose tokens are much the same, share the plan of the first.
    """
    pairs: list[tuple[PlacedBlock, ExactMatching | WindowMatching]] = []
    for placed in blocks_to_merge(unet, settings.max_downsample):
        matching = ExactMatching if settings.engine == "exact" else WindowMatching
        found = matching(placed.grid(size), settings.ratio, settings.sx, settings.sy)
        if found.gone:  # of few tokens a small ratio is none
            pairs.append((placed, found))
    grids = [found.grid for _, found in pairs]
    draws = draw_destinations(grids, seeds, steps, settings.sx, settings.sy, settings.use_rand)

    def start_step(step: int) -> None:
        fresh = step % settings.reuse_steps == 0
        for (placed, found), drawn in zip(pairs, draws, strict=True):
            placed.block.merging.fresh = fresh
            if fresh:
                placed.block.merging.plan = None  # a leader may not run at this step
                found.use(drawn[step], unet.device)

    blocks = [placed.block for placed, _ in pairs]
    before = [(block.__class__, block.__dict__.get("merging")) for block in blocks]
    shares = settings.engine == "window"
    leaders: dict[int, BlockMerging] = {}
    try:
        for placed, found in pairs:
            leader = leaders.get(placed.part)
            placed.block.merging = merging = BlockMerging(
                found,
                settings.merge_attn,
                settings.merge_crossattn,
                settings.merge_mlp,
                settings.whole_block,
                keeps=settings.reuse_steps > 1 or (shares and leader is None),
                leader=leader,
            )
            if shares:
                leaders.setdefault(placed.part, merging)
            placed.block.__class__ = MergedBlock
        start_step(0)
        with ExitStack() as stack:
            if unet.device.type == "cpu" and unet.dtype == torch.bfloat16:
                large = [placed.block for placed, found in pairs if math.prod(found.grid) >= MANY]
                stack.enter_context(fastest_blocks(large))
            if is_channels_last(unet):
                stack.enter_context(tokens_in_place(unet))
            yield start_step
    finally:
        for block, (kind, merging) in zip(blocks, before, strict=True):
            block.__class__ = kind
            if merging is None:
                block.__dict__.pop("merging", None)
            else:
                block.merging = merging


@contextmanager
def merged_by_tomesd(unet: Any, settings: TokenMerging, seed: int) -> Iterator[Callable[[int], None]]:
    """Merge by the authors' package, unchanged.

    It draws its cells from a copy of torch's global generator, made at the first forward pass. That is seeded here,
    and given back untouched, so that an image depends on its seed and not on what was drawn before. It draws for each
    call, so a second run of the same steps needs a second ``with`` block.
    """
    device = unet.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        tomesd.apply_patch(
            unet,
            ratio=settings.ratio,
            max_downsample=settings.max_downsample,
            sx=settings.sx,
            sy=settings.sy,
            use_rand=settings.use_rand,
            merge_attn=settings.merge_attn,
            merge_crossattn=settings.merge_crossattn,
            merge_mlp=settings.merge_mlp,
        )
        try:
            yield noop_step
        finally:
            tomesd.remove_patch(unet)
