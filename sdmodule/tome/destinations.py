"""Which tokens stay: one of each cell of ``sy`` by ``sx`` tokens, drawn for all steps and blocks before the first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdmodule.tome.blocks import Grid


def draw_destinations(
    grids: Sequence[Grid], seeds: Sequence[int], steps: int, sx: int, sy: int, use_rand: bool
) -> list[Tensor]:
    """Draw the token that stays in each cell, for each block, step and image.

    An image's draws come from a CPU generator of its own seed, step by step and block by block, in the order in which
    tomesd draws from its one generator: with one seed they are the same draws. They do not depend on the batch.

    Args:
        grids: height and width in tokens of each block.
        seeds: one for each image, or a single one for all.
        steps: how many times the UNet will be called.
        sx: width of a cell.
        sy: height of a cell.
        use_rand: draw; otherwise the first token of each cell stays.

    Returns:
        For each block ``[steps, R, h // sy, w // sx]``, from 0 to ``sx * sy - 1``, R the number of seeds.
    """
    cells = [(h // sy, w // sx) for h, w in grids]
    kind = torch.uint8 if sx * sy <= 256 else torch.int32
    if not use_rand:
        return [torch.zeros(steps, 1, *shape, dtype=kind) for shape in cells]
    draws = [torch.empty(steps, len(seeds), *shape, dtype=kind) for shape in cells]
    for image, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            for block, shape in zip(draws, cells, strict=True):
                block[step, image] = torch.randint(sy * sx, size=(*shape, 1), generator=generator)[..., 0]
    return draws


def destination_mask(draws: Tensor, grid: Grid, sx: int, sy: int) -> Tensor:
    """Mark the tokens that stay.

    Args:
        draws: the token that stays in each cell, counted by rows, ``[R, h // sy, w // sx]``.
        grid: height and width in tokens, which the cells need not fill.
        sx: width of a cell.
        sy: height of a cell.

    Returns:
        ``[R, h * w]``, boolean.
    """
    h, w = grid
    images, rows, columns = draws.shape
    inside = torch.arange(sy * sx) == draws[..., None]
    mask = torch.zeros(images, h, w, dtype=torch.bool)
    mask[:, : rows * sy, : columns * sx] = (
        inside.view(images, rows, columns, sy, sx).transpose(2, 3).reshape(images, rows * sy, columns * sx)
    )
    return mask.flatten(1)
