"""Bipartite matching inside small windows: no search over the image, no sort, nothing of a shape that varies.

The idea is that of Bolya and Hoffman 2023, with the search for a partner kept to a token's neighbourhood: a window of
two by two cells, 4x4 tokens for the usual strides, of which 4 stay. The 16x16 similarities of each window replace a
matrix over the whole image, and each token's rank among its 15 neighbours, counted by comparison, replaces sorting.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sdmodule.errors import SettingsError
from sdmodule.tome.blocks import Grid
from sdmodule.tome.destinations import destination_mask

EPSILON = 1e-12
"""The length that tokens shorter than that are taken to have, as by ``torch.nn.functional.normalize``."""


def tokens_merged(ratio: float, tokens: int) -> int:
    """How many of a window's tokens a ratio merges.

    Raises:
        SettingsError: for a ratio that would merge part of a token.
    """
    exact = ratio * tokens
    if abs(exact - round(exact)) > 1e-6:
        below, above = (int(exact) / tokens, (int(exact) + 1) / tokens)
        raise SettingsError(
            f"tome.ratio={ratio} merges {exact:g} tokens in each window of {tokens} with tome.engine=window; "
            f"give {below:g} or {above:g}, or use tome.engine=exact."
        )
    return round(exact)


class WindowMatching:
    """Match tokens to the most similar one of those that stay in their window, and merge the most similar pairs.

    Cells that no window of two by two holds, and tokens that no cell holds, stay as they are: at the lower and the
    right edge of grids that a window does not divide. On a grid that is one cell high or wide a window is too.

    Args:
        grid: height and width in tokens.
        ratio: share of each window's tokens that are merged.
        sx: width of a cell.
        sy: height of a cell.

    Raises:
        SettingsError: for a ratio that would merge part of a token.
    """

    def __init__(self, grid: Grid, ratio: float, sx: int, sy: int) -> None:
        self.grid, self.sx, self.sy = grid, sx, sy
        h, w = grid
        high, wide = sy * min(2, h // sy), sx * min(2, w // sx)
        self.size = high * wide
        self.gone = tokens_merged(ratio, self.size)
        rows, columns = h // high, w // wide
        self.windows = rows * columns
        self.left_over = h * w - self.windows * self.size
        self.merged = h * w - self.windows * self.gone

        token = torch.arange(h * w).view(h, w)
        inside = token[: rows * high, : columns * wide]
        inside = inside.reshape(rows, high, columns, wide).transpose(1, 2).flatten()
        outside = torch.ones(h * w, dtype=torch.bool).index_fill_(0, inside, False).nonzero()[:, 0]
        self.inside = inside
        self.place = torch.cat([inside, outside]).argsort()
        self.stays = torch.empty(0, dtype=torch.bool)

    def use(self, draws: Tensor, device: torch.device) -> None:
        """Take the draws ``[R, h // sy, w // sx]`` of a step."""
        mask = destination_mask(draws, self.grid, self.sx, self.sy)
        self.stays = mask[:, self.inside.cpu()].view(len(draws), self.windows, self.size).to(device)
        self.inside, self.place = self.inside.to(device), self.place.to(device)

    def positions(self, tokens: Tensor) -> Tensor:
        """The merged token of each of the tokens ``[B, N, C]``: ``[B, N]``. Those of no window come last."""
        batch = len(tokens)
        stays = self.stays.repeat(batch // len(self.stays), 1, 1).flatten(0, 1)
        inside = tokens.index_select(1, self.inside)
        length = inside.norm(dim=-1, keepdim=True).clamp_min_(EPSILON)
        unit = inside.div_(length).view(len(stays), self.size, -1)
        similarities = unit @ unit.transpose(1, 2)
        similarity, partner = similarities.masked_fill(~stays[:, None], -torch.inf).max(dim=-1)
        similarity = similarity.masked_fill(stays, -torch.inf)

        # a token's rank is how many are more similar to their partner; of equals, the first comes first
        this, other = similarity[:, :, None], similarity[:, None, :]
        earlier = torch.ones(self.size, self.size, dtype=torch.bool, device=tokens.device).tril(-1)
        rank = ((other > this) | ((other == this) & earlier)).sum(dim=-1)
        goes = rank < self.gone
        own = (~goes).cumsum(dim=-1) - 1
        slot = torch.where(goes, own.gather(1, partner), own)
        slot = slot.clamp(min=0)  # only what is not a number gets here below 0, and is to come out as it went in

        each = self.size - self.gone
        first = torch.arange(self.windows, device=tokens.device)[:, None] * each
        windowed = (slot.view(batch, self.windows, self.size) + first).flatten(1)
        rest = torch.arange(self.windows * each, self.merged, device=tokens.device).expand(batch, -1)
        return torch.cat([windowed, rest], dim=1).index_select(1, self.place)
