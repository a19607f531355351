"""A plan of one merge: which merged token each token is part of. To merge is to average, to unmerge is to copy back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """Where each of B x N tokens goes among the B x M merged ones.

    Attributes:
        rows: merged token of each token, counted over the whole batch, ``[B * N]``.
        counts: how many tokens each merged token stands for, ``[B * M, 1]``.
    """

    rows: Tensor
    counts: Tensor

    @classmethod
    def of(cls, positions: Tensor, merged: int) -> Plan:
        """Make a plan of integer maps.

        Args:
            positions: the merged token of each token, ``[B, N]``, each from 0 to M - 1.
            merged: M, how many merged tokens an image has.
        """
        batch = len(positions)
        first = torch.arange(batch, device=positions.device)[:, None] * merged
        rows = (positions + first).flatten()
        counts = rows.new_zeros(batch * merged).index_add_(0, rows, torch.ones_like(rows))
        return cls(rows, counts[:, None])

    def merge(self, tokens: Tensor, batch: int) -> Tensor:
        """Average tokens ``[B, N, C]`` that go together: ``[B, M, C]``."""
        sums = tokens.new_zeros(len(self.counts), tokens.shape[-1]).index_add_(0, self.rows, tokens.flatten(0, 1))
        return sums.div_(self.counts.to(sums.dtype)).unflatten(0, (batch, -1))

    def unmerge(self, merged: Tensor, batch: int) -> Tensor:
        """Give each token a copy of what it became part of: ``[B, M, C]`` to ``[B, N, C]``."""
        return merged.flatten(0, 1).index_select(0, self.rows).unflatten(0, (batch, -1))
