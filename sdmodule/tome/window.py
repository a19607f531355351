"""Bipartite matching within small windows: no search over the image, no sort, and no shape that varies.

As in Bolya and Hoffman 2023, but a token's partner is in its own window of two by two cells: 4x4 tokens with the
default strides, 4 of them destinations. The 16x16 similarities of each window replace a matrix over the whole image,
and ranks that are counted by comparing neighbors replace the sort.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdmodule.diffusion.upload import upload
from sdmodule.errors import SettingsError
from sdmodule.tome.blocks import Grid
from sdmodule.tome.destinations import destination_mask

EPSILON = 1e-12
"""Lower bound of a token's length, as in ``torch.nn.functional.normalize``."""


def tokens_merged(ratio: float, tokens: int) -> int:
    """Number of tokens that a ratio merges in a window.

    Raises:
        SettingsError: if it is not a whole number.
    """
    exact = ratio * tokens
    if abs(exact - round(exact)) > 1e-6:
        below, above = (int(exact) / tokens, (int(exact) + 1) / tokens)
        raise SettingsError(
            f"tome.ratio={ratio}: would merge {exact:g} of the {tokens} tokens in each window with tome.engine=window; "
            f"give {below:g} or {above:g}, or use tome.engine=exact."
        )
    return round(exact)


class WindowMatching:
    """Match each token to its most similar destination within its window, and merge the most similar pairs.

    Where windows do not divide the grid, the tokens that are left over at the lower and right edge are not merged. On a
    grid that is one cell high or wide, so are the windows.

    Attributes:
        removed: number of tokens that are merged into a destination, in each window.
        merged: number of tokens that remain.

    Args:
        grid: height and width in tokens.
        ratio: share of each window's tokens that are merged.
        sx: width of a cell.
        sy: height of a cell.

    Raises:
        SettingsError: if the ratio does not merge a whole number of tokens in each window.
    """

    def __init__(self, grid: Grid, ratio: float, sx: int, sy: int) -> None:
        self.grid, self.sx, self.sy = grid, sx, sy
        h, w = grid
        window_h, window_w = sy * min(2, h // sy), sx * min(2, w // sx)
        self.size = window_h * window_w
        self.removed = tokens_merged(ratio, self.size)
        rows, columns = h // window_h, w // window_w
        self.windows = rows * columns
        self.left_over = h * w - self.windows * self.size
        self.merged = h * w - self.windows * self.removed

        token = torch.arange(h * w).view(h, w)
        inside = token[: rows * window_h, : columns * window_w]
        inside = inside.reshape(rows, window_h, columns, window_w).transpose(1, 2).flatten()
        outside = torch.ones(h * w, dtype=torch.bool).index_fill_(0, inside, False).nonzero()[:, 0]
        self.inside = inside
        self.place = torch.cat([inside, outside]).argsort()
        self.stays = torch.empty(0, dtype=torch.bool)

    def use(self, draws: Tensor) -> None:
        """Set the destinations ``[R, h // sy, w // sx]`` of a step."""
        self.inside, self.place = (upload(indices, draws.device) for indices in (self.inside, self.place))  # once
        mask = destination_mask(draws, self.grid, self.sx, self.sy)
        self.stays = mask.index_select(1, self.inside).view(len(draws), self.windows, self.size)

    def positions(self, tokens: Tensor) -> Tensor:
        """Index of the merged token of each token ``[B, N, C]``: ``[B, N]``. Tokens outside windows come last."""
        batch = len(tokens)
        stays = self.stays.repeat(batch // len(self.stays), 1, 1).flatten(0, 1)
        inside = tokens.index_select(1, self.inside)
        length = inside.norm(dim=-1, keepdim=True).clamp_min_(EPSILON)
        unit = inside.div_(length).view(len(stays), self.size, -1)
        similarities = unit @ unit.transpose(1, 2)
        similarity, partner = similarities.masked_fill(~stays[:, None], -torch.inf).max(dim=-1)
        similarity = similarity.masked_fill(stays, -torch.inf)

        # a token's rank is the number of tokens that are more similar to their partner; ties go to the earlier token
        this, other = similarity[:, :, None], similarity[:, None, :]
        earlier = torch.ones(self.size, self.size, dtype=torch.bool, device=tokens.device).tril(-1)
        rank = ((other > this) | ((other == this) & earlier)).sum(dim=-1)
        goes = rank < self.removed
        own = (~goes).cumsum(dim=-1) - 1
        slot = torch.where(goes, own.gather(1, partner), own)
        slot = slot.clamp(min=0)  # only NaNs get below 0 here; they come out as they went in

        each = self.size - self.removed
        first = torch.arange(self.windows, device=tokens.device)[:, None] * each
        windowed = (slot.view(batch, self.windows, self.size) + first).flatten(1)
        rest = torch.arange(self.windows * each, self.merged, device=tokens.device).expand(batch, -1)
        return torch.cat([windowed, rest], dim=1).index_select(1, self.place)
