"""The destination tokens that others merge into: one of each ``sy`` by ``sx`` cell, drawn ahead of the first step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sdmodule.tome.blocks import Grid


def draw_destinations(
    grids: Sequence[Grid], seeds: Sequence[int], steps: int, sx: int, sy: int, use_rand: bool
) -> list[Tensor]:
    """Draw the destination of each cell, for each block, step and image.

    Each image has a CPU generator of its own seed, which draws step by step and block by block, in the order of
    tomesd's single generator: for one seed the draws are tomesd's. They do not depend on the batch.

    Args:
        grids: height and width in tokens of each block.
        seeds: one for each image, or a single one for all.
        steps: number of calls of the UNet.
        sx: width of a cell.
        sy: height of a cell.
        use_rand: draw at random; otherwise the destination is the first token of each cell.

    Returns:
        For each block ``[steps, R, h // sy, w // sx]`` with values 0 to ``sx * sy - 1``; R is the number of seeds, or 1
        without ``use_rand``.
    """
    cells = [(h // sy, w // sx) for h, w in grids]
    dtype = torch.uint8 if sx * sy <= 256 else torch.int32
    if not use_rand:
        return [torch.zeros(steps, 1, *shape, dtype=dtype) for shape in cells]
    draws = [torch.empty(steps, len(seeds), *shape, dtype=dtype) for shape in cells]
    for image, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            for block, shape in zip(draws, cells, strict=True):
                block[step, image] = torch.randint(sy * sx, size=(*shape, 1), generator=generator)[..., 0]
    return draws


def destination_mask(draws: Tensor, grid: Grid, sx: int, sy: int) -> Tensor:
    """Mask of the destination tokens.

    Args:
        draws: the destination in each cell, row-major, ``[R, h // sy, w // sx]``.
        grid: height and width in tokens; cells need not divide it.
        sx: width of a cell.
        sy: height of a cell.

    Returns:
        ``[R, h * w]``, bool.
    """
    h, w = grid
    images, rows, columns = draws.shape
    inside = torch.arange(sy * sx, device=draws.device) == draws[..., None]
    mask = torch.zeros(images, h, w, dtype=torch.bool, device=draws.device)
    mask[:, : rows * sy, : columns * sx] = (
        inside.view(images, rows, columns, sy, sx).transpose(2, 3).reshape(images, rows * sy, columns * sx)
    )
    return mask.flatten(1)
