"""The steps of a scheduler as linear combinations, whose coefficients are known before the first step.

A step of almost every scheduler is linear in latents, predictions and noise of this step and those before it: DDIM,
Euler, linear multistep, DPM-Solver++, UniPC. So its coefficients need not be written down again: fed unit vectors, the
scheduler itself returns them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import LMSDiscreteScheduler
from torch import Tensor
from torch.overrides import TorchFunctionMode

MOST_LAGS = 5
"""Earlier steps that a step may depend on: PNDM depends on four."""

TOLERANCE = 1e-5
"""Relative error of a combination up to which a step counts as linear; schedulers compute in float32 in part."""

NEGLIGIBLE = 1e-9
"""Coefficients that are left out, relative to a step's largest."""

PROBES = 16
"""Random numbers that test whether a step is linear."""

KINDS = 3
"""Kinds of what a step combines: latents, predictions, noise."""


@dataclass(frozen=True)
class LinearSteps:
    """N steps, each a linear combination of tensors ``[B, C, h, w]``.

    In the order of the columns of ``coefficients``: the prediction, the latents of the steps ``latent_lags`` before
    (0 is this step), the predictions of the steps ``prediction_lags`` before (from 1 on), what the step before returned
    if ``own``, and noise if any of ``draws``.

    Attributes:
        coefficients: float32 ``[N, K]``.
        input_scales: what the latents are multiplied with before the denoiser sees them, float32 ``[N]``.
        latent_lags: see above.
        prediction_lags: see above.
        own: see above; the latents may differ from what the step before returned, where something changed them.
        draws: whether each step draws noise.
    """

    coefficients: Tensor
    input_scales: Tensor
    latent_lags: tuple[int, ...]
    prediction_lags: tuple[int, ...]
    own: bool
    draws: tuple[bool, ...]


def linear_steps(scheduler: Any, timesteps: Tensor, **arguments: Any) -> LinearSteps | None:
    """The steps of a scheduler as linear combinations; None if they are not, as with clipped or thresholded samples.

    Args:
        scheduler: a scheduler of diffusers before its first step; it stays there.
        timesteps: of its steps, ``[N]``.
        arguments: further ones of its ``step``; a generator is not used.
    """
    responses = _responses(scheduler, timesteps, arguments)
    if responses is None:
        return None
    rows, input_scales, draws = responses
    for own in (False, True):
        for lags in range(MOST_LAGS + 1):
            short = _shortened(rows, lags, own)
            if short is not None:
                return _table(*short, lags, input_scales, draws)
    return None


class _Noise(TorchFunctionMode):
    """Gives a scheduler a chosen tensor for the noise that it draws.

    Attributes:
        given: for the noise of the step, ``[1, D, 1, 1]``.
        drawn: how often it was asked for in the step.
    """

    given: Tensor
    drawn = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of a function of torch."""
        if func is not torch.randn:
            return func(*args, **(kwargs or {}))
        self.drawn += 1
        return self.given.to((kwargs or {}).get("dtype"))


def _responses(scheduler: Any, timesteps: Tensor, arguments: Any) -> tuple[Tensor, Tensor, tuple[bool, ...]] | None:
    """What each step returns of all latents, predictions and noise up to it: ``[N, 3, N]``, in that order.

    Beside each unit vector the steps get random numbers, also for what earlier ones returned. These show whether they
    are linear, element by element.

    Returns:
        These, the input scales ``[N]`` and whether each step draws; None if the steps are not linear.
    """
    scheduler = copy.deepcopy(scheduler)
    if isinstance(scheduler, LMSDiscreteScheduler):  # integrates coefficients, with tensors ten times as slowly
        scheduler.sigmas = scheduler.sigmas.tolist()
    if "generator" in arguments:
        arguments = {**arguments, "generator": torch.Generator()}
    steps = len(timesteps)
    width = KINDS * steps
    probes = torch.randn(width, PROBES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    probes *= 10  # far beyond the range that samples are clipped to

    def given(kind: int, step: int) -> Tensor:
        unit = torch.zeros(width, dtype=torch.float64)
        unit[kind * steps + step] = 1
        return torch.cat([unit, probes[kind * steps + step]])[None, :, None, None]

    rows, input_scales, draws = [], [], []
    noise = _Noise()
    with noise:
        for step, timestep in enumerate(timesteps):
            latents, prediction = given(0, step), given(1, step)
            noise.given, noise.drawn = given(2, step), 0
            input_scales.append(scheduler.scale_model_input(latents, timestep)[0, step, 0, 0])
            made = scheduler.step(prediction, timestep, latents, **arguments, return_dict=False)[0]
            row, combined = made.double().flatten().split([width, PROBES])
            error = (row @ probes - combined).abs().max()
            if noise.drawn > 1 or not error <= TOLERANCE * combined.abs().max():  # nor if it is NaN
                return None
            rows.append(row)
            draws.append(noise.drawn == 1)
    return torch.stack(rows).view(steps, KINDS, steps), torch.stack(input_scales), tuple(draws)


def _shortened(rows: Tensor, lags: int, own: bool) -> tuple[Tensor, Tensor] | None:
    """Combinations that reach back ``lags`` steps, with what the step before returned if ``own``.

    That holds what is older, as in UniPC, whose corrected latents depend on all steps so far.

    Args:
        rows: from `_responses`, ``[N, 3, N]``.
        lags: steps to reach back.
        own: whether to use the result before.

    Returns:
        The rows without what is older, ``[N, 3, N]``, and the factors of the results before, ``[N]``; None if steps
        reach further.
    """
    rows, factors = rows.clone(), torch.zeros(len(rows), dtype=rows.dtype)
    for step in range(len(rows) - 1, 0, -1):  # from the end, as a row before must still be whole
        old = slice(0, max(step - lags, 0))
        older, before = rows[step, :, old], rows[step - 1, :, old]
        if own and before.any():
            factors[step] = (older * before).sum() / before.square().sum()
            rows[step] -= factors[step] * rows[step - 1]
        if older.numel() and older.abs().max() > NEGLIGIBLE * rows[step].abs().max():
            return None
    return rows, factors


def _table(rows: Tensor, factors: Tensor, lags: int, input_scales: Tensor, draws: tuple[bool, ...]) -> LinearSteps:
    """The columns that are not zero in all rows."""
    lagged = torch.zeros(KINDS, lags + 1, len(rows), dtype=rows.dtype)
    for lag in range(min(lags + 1, len(rows))):
        lagged[:, lag, lag:] = rows.diagonal(offset=-lag, dim1=0, dim2=2)
    latents, predictions, noise = lagged
    latent_lags = tuple(lag for lag in range(lags + 1) if latents[lag].any())
    prediction_lags = tuple(lag for lag in range(1, lags + 1) if predictions[lag].any())
    own = bool(factors.any())
    columns = [
        predictions[0],
        *(latents[lag] for lag in latent_lags),
        *(predictions[lag] for lag in prediction_lags),
        *([factors] if own else []),
        *([noise[0]] if any(draws) else []),
    ]
    coefficients = torch.stack(columns, dim=1).float()
    return LinearSteps(coefficients, input_scales.float(), latent_lags, prediction_lags, own, draws)
