"""Intervals of confidence by the bootstrap (Efron and Tibshirani 1993)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

STANDARD_ERRORS = 1.959964
"""Half the width of a 95% interval of a normal distribution, in standard errors."""


@dataclass(frozen=True)
class Measured:
    """A figure with its 95% interval: the figure plus and minus 1.96 bootstrap standard errors.

    Percentiles of the bootstrap would not do: a distance between sets grows when images occur twice, so that its
    resamples lie above it.

    Attributes:
        value: the figure.
        low: lower end of the interval.
        high: upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: Tensor, bounds: tuple[float, float] = (-torch.inf, torch.inf)) -> Measured:
        """A figure and what it is in each resample ``[B]``; the interval ends where the figure's range does."""
        half = STANDARD_ERRORS * float(resampled.double().std())
        return cls(float(value), max(float(value) - half, bounds[0]), min(float(value) + half, bounds[1]))

    def plain(self) -> dict[str, float]:
        """As plain types, for JSON."""
        return asdict(self)


def resampled_counts(size: int, resamples: int, seed: int) -> Tensor:
    """How often each of ``size`` images is drawn in each resample, ``[size, resamples]``, int16.

    Images are drawn with replacement, as many as there are. The same seed gives the same draws.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = torch.empty(size, resamples, dtype=torch.int16)
    for k in range(resamples):
        counts[:, k] = torch.bincount(torch.randint(size, (size,), generator=generator), minlength=size)
    return counts


def mean_of(values: Tensor, counts: Tensor, bounds: tuple[float, float] = (-torch.inf, torch.inf)) -> Measured:
    """The mean of one value per image ``[N]``, with its interval.

    Args:
        values: one per image.
        counts: of `resampled_counts`, ``[N, B]``.
        bounds: smallest and largest value that an image can have.
    """
    values = values.double()
    resampled = torch.cat([values @ part.double() for part in counts.split(64, dim=1)])
    return Measured.of(float(values.mean()), resampled / len(values), bounds)
