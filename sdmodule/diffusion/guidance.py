"""Classifier-free guidance."""

from __future__ import annotations

from torch import Tensor


def classifier_free_guidance(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """Push a prediction away from the unconditional one (Ho and Salimans 2022, equation 6, with w = scale - 1).

    Args:
        unconditional: prediction for the negative prompt, ``[B, C, h, w]``.
        conditional: prediction for the prompt, same shape.
        scale: 1 leaves the conditional prediction as it is.
    """
    return unconditional + scale * (conditional - unconditional)


def rescale_guidance(guided: Tensor, conditional: Tensor, amount: float) -> Tensor:
    """Give a guided prediction back the spread of the conditional one (Lin et al. 2023, equations 15 and 16).

    Args:
        guided: result of :func:`classifier_free_guidance`, ``[B, C, h, w]``.
        conditional: prediction for the prompt, same shape.
        amount: 0 keeps ``guided``, 1 takes the whole correction.
    """
    axes = tuple(range(1, guided.ndim))
    matched = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return amount * matched + (1 - amount) * guided
