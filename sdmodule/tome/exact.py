"""Bipartite soft matching over the whole image (Bolya and Hoffman 2023, section 4), with the result of tomesd.

tomesd moves tokens by ``gather`` and ``scatter`` with an index for every channel. Here a match is one integer per
token, and tokens move as whole rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdmodule.tome.blocks import Grid
from sdmodule.tome.destinations import destination_mask


class ExactMatching:
    """Match each token to its most similar destination, and merge the most similar pairs.

    Attributes:
        removed: number of tokens that are merged into a destination.
        merged: number of tokens that remain.

    Args:
        grid: height and width in tokens.
        ratio: share of the tokens that are merged.
        sx: width of a cell.
        sy: height of a cell.
    """

    def __init__(self, grid: Grid, ratio: float, sx: int, sy: int) -> None:
        self.grid, self.sx, self.sy = grid, sx, sy
        tokens = grid[0] * grid[1]
        self.staying = (grid[0] // sy) * (grid[1] // sx)
        self.removed = min(int(tokens * ratio), tokens - self.staying)
        self.merged = tokens - self.removed
        self.order = self.place = torch.empty(0, dtype=torch.int64)

    def use(self, draws: Tensor) -> None:
        """Set the destinations ``[R, h // sy, w // sx]`` of a step, outside the UNet's graph, which needs no sort."""
        mask = destination_mask(draws, self.grid, self.sx, self.sy)
        if mask.device.type != "cpu":
            self.order, self.place = sort_by_counting(mask)
            return
        # an unstable sort of the same values as in tomesd: equal ones are in arbitrary order, but in the same order
        self.order = mask.to(torch.int64).neg().argsort(dim=1)
        self.place = self.order.argsort(dim=1)

    def positions(self, tokens: Tensor) -> Tensor:
        """Index of the merged token of each token ``[B, N, C]``: ``[B, N]``. Destinations have the last indices."""
        batch, count, _ = tokens.shape
        order = self.order.repeat(batch // len(self.order), 1)
        place = self.place.repeat(batch // len(self.place), 1)
        first = torch.arange(batch, device=tokens.device)[:, None] * count
        unit = (tokens / tokens.norm(dim=-1, keepdim=True)).flatten(0, 1)
        staying, leaving = (
            unit.index_select(0, rows.flatten()).unflatten(0, rows.shape)
            for rows in (order + first).split([self.staying, count - self.staying], dim=1)
        )
        similarity, partner = most_similar(leaving, staying)

        # by falling similarity: the first `removed` merge into their partner, the others keep a place of their own
        ranked = similarity.argsort(dim=-1, descending=True)
        kept = self.merged - self.staying
        own = torch.arange(-self.removed, kept, device=tokens.device).expand_as(ranked)
        partners = partner.gather(1, ranked[:, : self.removed]) + kept
        chosen = torch.cat([partners, own[:, self.removed :]], dim=1)
        leavers = torch.empty_like(chosen).scatter_(1, ranked, chosen)
        stayers = torch.arange(kept, self.merged, device=tokens.device).expand(batch, -1)
        return torch.cat([stayers, leavers], dim=1).gather(1, place)


def sort_by_counting(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the tokens of a mask ``[R, N]`` with the masked ones first, and the place of each token among them.

    A GPU counts many times faster than it sorts.

    Returns:
        Two tensors ``[R, N]``.
    """
    masked = mask.cumsum(dim=1)
    tokens = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    place = torch.where(mask, masked - 1, masked[:, -1:] + tokens - masked)
    return torch.empty_like(place).scatter_(1, place, tokens), place


def most_similar(tokens: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Highest similarity of each token ``[B, N, C]`` to the others ``[B, M, C]``, and the index of that other token.

    Returns:
        Two tensors ``[B, N]``.
    """
    # max_pool2d has one thread per image, which leaves most of many threads idle; a compiled graph cannot count them
    if torch.compiler.is_compiling() or tokens.device.type != "cpu" or torch.get_num_threads() > 4:
        return (tokens @ others.transpose(1, 2)).max(dim=-1)
    # a pooling window over all others gives the same in a quarter of the time of `max` on two cores
    similarities = (others @ tokens.transpose(1, 2)).unsqueeze(2).permute(0, 3, 1, 2)
    largest, place = F.max_pool2d(similarities, (others.shape[1], 1), return_indices=True)
    return largest.flatten(1), place.flatten(1)
