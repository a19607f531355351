"""The plan of one merge: the merged token of each token. Merging averages tokens; unmerging copies the average back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """The merged token of each token, for a batch of B images with N tokens each, of which M remain.

    Attributes:
        rows: index of each token's merged token in the batch, ``[B * N]``.
        counts: number of tokens in each merged token, ``[B * M, 1]``.
        order: the tokens sorted by their merged token, ``[B * N]``; None on a CPU.
    """

    rows: Tensor
    counts: Tensor
    order: Tensor | None = None

    @classmethod
    def of(cls, positions: Tensor, merged: int, by_segments: bool | None = None) -> Plan:
        """Plan from the indices of merged tokens within each image.

        Args:
            positions: index of each token's merged token, ``[B, N]``, from 0 to M - 1.
            merged: M, the number of merged tokens of an image.
            by_segments: average sorted segments; if None, wherever ``index_add_`` is not deterministic.
        """
        batch = len(positions)
        first = torch.arange(batch, device=positions.device)[:, None] * merged
        rows = (positions + first).flatten()
        counts = rows.new_zeros(batch * merged).index_add_(0, rows, torch.ones_like(rows))
        sorts = rows.device.type != "cpu" if by_segments is None else by_segments
        return cls(rows, counts[:, None], rows.argsort(stable=True) if sorts else None)

    def merge(self, tokens: Tensor, batch: int) -> Tensor:
        """Average the tokens of each merged token: ``[B, N, C]`` to ``[B, M, C]``.

        On a GPU ``index_add_`` sums in an order that differs from call to call, so that an image could not be made
        again. There the tokens of each merged token are summed one after the other, in float32.
        """
        if self.order is None:
            sums = tokens.new_zeros(len(self.counts), tokens.shape[-1]).index_add_(0, self.rows, tokens.flatten(0, 1))
            return sums.div_(self.counts.to(sums.dtype)).unflatten(0, (batch, -1))
        sorted_tokens = tokens.flatten(0, 1).index_select(0, self.order).float()
        means = torch.segment_reduce(sorted_tokens, "mean", lengths=self.counts[:, 0], axis=0, unsafe=True)
        return means.to(tokens.dtype).unflatten(0, (batch, -1))

    def unmerge(self, merged: Tensor, batch: int) -> Tensor:
        """Copy each merged token back to its tokens: ``[B, M, C]`` to ``[B, N, C]``."""
        return merged.flatten(0, 1).index_select(0, self.rows).unflatten(0, (batch, -1))
