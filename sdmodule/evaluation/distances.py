"""Distances between two sets of images, as functions of their features; all in float64."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sdmodule.errors import SettingsError

BLOCK = 1024
"""Rows and columns of a kernel matrix that are in memory at once."""

BANDWIDTH, SCALE = 10.0, 1000.0
"""Sigma of CMMD's kernel, and the factor that makes its values readable."""


def frechet_distance(one: Tensor, other: Tensor, weights: Tensor | None = None, others: Tensor | None = None) -> float:
    """The squared Fréchet distance of two normal distributions with the sets' means and covariances.

    Of Inception's features it is FID (Heusel et al. 2017). It is biased upwards, the more the fewer the images are.

    Args:
        one: features ``[N, D]``.
        other: features ``[M, D]``.
        weights: how often each image of ``one`` counts, ``[N]``; once if None.
        others: the same for ``other``, ``[M]``.

    Raises:
        SettingsError: if a set has fewer than two images, or the features have different lengths.
    """
    _check_sets(one, other)
    (mean, factor), (other_mean, other_factor) = _moments(one, weights), _moments(other, others)
    traces = factor.square().sum() + other_factor.square().sum() - 2 * _trace_of_root(factor, other_factor)
    return max(float((mean - other_mean).square().sum() + traces), 0.0)  # rounding may end below


def kernel_distance(one: Tensor, other: Tensor, weights: Tensor | None = None, others: Tensor | None = None) -> Tensor:
    """The unbiased estimate of the squared MMD with the kernel ``(x·y / D + 1)³``.

    Of Inception's features it is KID (Bińkowski et al. 2018), of all images at once instead of the mean over random
    subsets. It may be below 0.

    Args:
        one: features ``[N, D]``.
        other: features ``[M, D]``.
        weights: how often each image of ``one`` counts, in B cases, ``[N, B]``; an image is never compared with itself,
            nor with its copies. If None, each counts once and B is 1.
        others: the same for ``other``, ``[M, B]``.

    Returns:
        One estimate per case, ``[B]``.

    Raises:
        SettingsError: if a set has fewer than two images, or the features have different lengths.
    """
    _check_sets(one, other)
    return _squared_mmd(one.double(), other.double(), _cubic, weights, others, unbiased=True)


def cmmd(one: Tensor, other: Tensor, weights: Tensor | None = None, others: Tensor | None = None) -> Tensor:
    """CMMD (Jayasumana et al. 2024): 1,000 times the squared MMD of normalized features, with a Gaussian kernel.

    Its sigma is 10. As in the authors' code the estimate is the biased one, which is 0 for equal sets. The paper takes
    features of CLIP ViT-L/14 at 336 pixels; values of other scorers do not compare with its.

    Args:
        one: features ``[N, D]`` of a scorer.
        other: features ``[M, D]``.
        weights: how often each image of ``one`` counts, in B cases, ``[N, B]``. If None, each counts once and B is 1.
        others: the same for ``other``, ``[M, B]``.

    Returns:
        One estimate per case, ``[B]``.

    Raises:
        SettingsError: if a set has fewer than two images, or the features have different lengths.
    """
    _check_sets(one, other)
    one, other = normalize(one.double(), dim=-1), normalize(other.double(), dim=-1)
    return SCALE * _squared_mmd(one, other, _gaussian, weights, others, unbiased=False)


def _check_sets(one: Tensor, other: Tensor) -> None:
    if min(len(one), len(other)) < 2:
        raise SettingsError(
            f"{len(one)} and {len(other)} images: too few for a distance between sets; give at least 2 of each, and "
            "thousands for a figure that can be trusted."
        )
    if one.shape[1] != other.shape[1]:
        raise SettingsError(
            f"features of {one.shape[1]} and {other.shape[1]} numbers: not of one network; take both from the same."
        )


def _moments(features: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean ``[D]``, and ``F [N, D]`` whose ``F.T @ F`` is the covariance, with N - 1 as divisor."""
    features = features.double()
    weights = torch.ones(len(features), device=features.device) if weights is None else weights
    weights = weights.double()
    count = weights.sum()
    mean = weights @ features / count
    return mean, (features - mean) * (weights / (count - 1)).sqrt()[:, None]


def _trace_of_root(factor: Tensor, other: Tensor) -> Tensor:
    """The trace of the root of ``F.T @ F @ G.T @ G``, for F ``[N, D]`` and G ``[M, D]``."""
    if max(len(factor), len(other)) <= factor.shape[1]:
        return torch.linalg.svdvals(factor @ other.T).sum()
    values, vectors = torch.linalg.eigh(factor.T @ factor)
    root = vectors * values.clamp(min=0).sqrt()
    projected = other @ root  # so that a symmetric matrix has the eigenvalues of the product
    return torch.linalg.eigvalsh(projected.T @ projected).clamp(min=0).sqrt().sum()


def _cubic(one: Tensor, other: Tensor) -> Tensor:
    return (one @ other.T / one.shape[1] + 1) ** 3


def _gaussian(one: Tensor, other: Tensor) -> Tensor:
    squared = one.square().sum(1)[:, None] + other.square().sum(1) - 2 * one @ other.T
    return torch.exp(-squared / (2 * BANDWIDTH**2))


def _squared_mmd(
    one: Tensor,
    other: Tensor,
    kernel: Callable[[Tensor, Tensor], Tensor],
    weights: Tensor | None,
    others: Tensor | None,
    unbiased: bool,
) -> Tensor:
    """Squared maximum mean discrepancy (Gretton et al. 2012), one per column of the weights, ``[B]``."""
    weights = torch.ones(len(one), 1, device=one.device) if weights is None else weights
    others = torch.ones(len(other), 1, device=other.device) if others is None else others
    count, other_count = weights.double().sum(0), others.double().sum(0)
    within = _pair_sums(one, one, kernel, weights, weights, unbiased) / _pairs(weights, unbiased)
    within += _pair_sums(other, other, kernel, others, others, unbiased) / _pairs(others, unbiased)
    return within - 2 * _pair_sums(one, other, kernel, weights, others, False) / (count * other_count)


def _pairs(weights: Tensor, unbiased: bool) -> Tensor:
    """How many pairs of images are compared within a set, ``[B]``."""
    weights = weights.double()
    return weights.sum(0).square() - (weights.square().sum(0) if unbiased else 0)


def _pair_sums(
    one: Tensor,
    other: Tensor,
    kernel: Callable[[Tensor, Tensor], Tensor],
    weights: Tensor,
    others: Tensor,
    without_self: bool,
) -> Tensor:
    """The kernel's sum over all pairs, ``[B]``; a block of the matrix at a time, however many images there are."""
    total = torch.zeros(weights.shape[1], dtype=torch.float64, device=one.device)
    for rows, row_weights in zip(one.split(BLOCK), weights.split(BLOCK), strict=True):
        for columns, column_weights in zip(other.split(BLOCK), others.split(BLOCK), strict=True):
            block = kernel(rows, columns)
            if without_self and rows.data_ptr() == columns.data_ptr():
                block.fill_diagonal_(0)
            total += ((block @ column_weights.double()) * row_weights.double()).sum(0)
    return total
