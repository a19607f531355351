"""Classifier-free guidance and its rescaling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, scale: float | Tensor) -> Tensor:
    """Guided prediction ``[B, C, h, w]`` (Ho and Salimans 2022, equation 6, with w = scale - 1).

    Args:
        unconditional: prediction for the negative prompt, ``[B, C, h, w]``.
        conditional: prediction for the prompt, same shape.
        scale: guidance scale; 1 gives the conditional prediction.
    """
    return unconditional + scale * (conditional - unconditional)


def rescale_guidance(guided: Tensor, conditional: Tensor, amount: float | Tensor) -> Tensor:
    """Rescale a guided prediction to the standard deviation of the conditional one (Lin et al. 2023, eqs. 15 and 16).

    Args:
        guided: result of `classifier_free_guidance`, ``[B, C, h, w]``.
        conditional: prediction for the prompt, same shape.
        amount: from 0, no rescaling, to 1, full rescaling.

    Returns:
        ``[B, C, h, w]``.
    """
    axes = tuple(range(1, guided.ndim))
    rescaled = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return amount * rescaled + (1 - amount) * guided


def embed_guidance_scale(scale: float, width: int) -> Tensor:
    """Sinusoidal embedding of a guidance scale, ``[1, width]``, for distilled UNets (Meng et al. 2023, section 3.1)."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half) * -(math.log(10000.0) / (half - 1)))
    angles = (scale - 1.0) * 1000.0 * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()]), (0, width % 2))[None]
