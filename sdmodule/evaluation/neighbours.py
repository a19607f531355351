"""Fidelity and diversity by nearest neighbours: precision, recall, density and coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdmodule.errors import SettingsError

NEAREST = 5
"""The k of the k-th nearest neighbour, as in Naeem et al. 2020."""

ROWS = 512
"""Rows of a matrix of distances that are in memory at once."""


@dataclass(frozen=True)
class Neighbourhood:
    """Where each image lies among those of the other set; the means are the metrics.

    Attributes:
        precision: ``[N]``, 1 for an image within the real ones: in the ball of any real image, whose radius is its
            distance to its k-th nearest real neighbour (Kynkäänniemi et al. 2019).
        density: ``[N]``, how many of these balls an image lies in, divided by k (Naeem et al. 2020).
        recall: ``[M]``, 1 for a real image within the others, in the same sense.
        coverage: ``[M]``, 1 for a real image in whose ball there is any image (Naeem et al. 2020).
    """

    precision: Tensor
    density: Tensor
    recall: Tensor
    coverage: Tensor


def neighbourhood(images: Tensor, real: Tensor, nearest: int = NEAREST) -> Neighbourhood:
    """Precision, density, recall and coverage, image by image.

    Args:
        images: features ``[N, D]`` of the images to judge.
        real: features ``[M, D]`` of the images that they should be like.
        nearest: the k of the k-th nearest neighbour.

    Raises:
        SettingsError: if a set has not more than ``nearest`` images.
    """
    if min(len(images), len(real)) <= nearest:
        raise SettingsError(
            f"{len(images)} and {len(real)} images: too few for precision and recall; give {nearest + 1}."
        )
    images, real = images.double(), real.double()
    radii, real_radii = _radii(images, nearest), _radii(real, nearest)
    balls = torch.zeros(len(images), dtype=torch.float64, device=images.device)
    recall, coverage = [], []
    for rows, row_radii in zip(real.split(ROWS), real_radii.split(ROWS), strict=True):
        distances = torch.cdist(rows, images)
        inside = distances <= row_radii[:, None]
        balls += inside.sum(0)
        coverage.append(inside.any(1))
        recall.append((distances <= radii).any(1))
    precision = (balls > 0).double()
    return Neighbourhood(precision, balls / nearest, torch.cat(recall).double(), torch.cat(coverage).double())


def _radii(features: Tensor, nearest: int) -> Tensor:
    """Distance of each row to its k-th nearest other row, ``[N]``."""
    return torch.cat([torch.cdist(rows, features).kthvalue(nearest + 1).values for rows in features.split(ROWS)])
