"""How well images show their prompts."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sdmodule.errors import SettingsError

WEIGHT = 2.5
"""The w of CLIPScore."""

ROWS = 1024
"""Images whose similarities to all prompts are in memory at once."""


def clip_scores(images: Tensor, texts: Tensor) -> Tensor:
    """CLIPScore of each image with its text, ``[N]``: ``2.5 max(cos(image, text), 0)`` (Hessel et al. 2021, section 3).

    The texts are scored as they are; the paper puts "A photo depicts" before captions of photographs. torchmetrics'
    ``CLIPScore`` is 100 times the cosine instead, 40 times this.

    Args:
        images: features ``[N, D]`` of a scorer.
        texts: features ``[N, D]`` of their prompts.

    Raises:
        SettingsError: if their numbers differ.
    """
    if len(images) != len(texts):
        raise SettingsError(f"{len(images)} images and {len(texts)} prompts: give one prompt for each image.")
    cosines = (normalize(images.double(), dim=-1) * normalize(texts.double(), dim=-1)).sum(-1)
    return WEIGHT * cosines.clamp(min=0)


def prompt_ranks(images: Tensor, texts: Tensor, own: Tensor) -> Tensor:
    """How many other texts are nearer to each image than its own, ``[N]``: 0 where its own is the nearest.

    The share of ranks below k is retrieval's top-k accuracy. Ties count against the image.

    Args:
        images: features ``[N, D]`` of a scorer.
        texts: features ``[T, D]`` of all distinct prompts.
        own: for each image, the row of its own prompt in ``texts``.
    """
    candidates = normalize(texts.double(), dim=-1)
    ranks = []
    for rows, mine in zip(images.split(ROWS), own.split(ROWS), strict=True):
        similarities = normalize(rows.double(), dim=-1) @ candidates.T
        ranks.append((similarities >= similarities.gather(1, mine[:, None])).sum(1) - 1)
    return torch.cat(ranks)
