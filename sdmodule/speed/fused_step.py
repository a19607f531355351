"""Guidance and the scheduler's step as one compiled function, whose coefficients are on the device.

Eagerly, each of their products and sums is a kernel of its own: a dozen to thirty a step. Compiled, they are one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdmodule.diffusion.guidance import classifier_free_guidance, rescale_guidance
from sdmodule.diffusion.linear_steps import LinearSteps, linear_steps
from sdmodule.diffusion.sampler import step_arguments
from sdmodule.diffusion.upload import upload

ALIGNED = 4
"""Coefficients that a row of them is padded to: compiled code copies what is not aligned to 16 bytes."""

MOST_TABLES = 64
"""Schedules whose coefficients are kept."""


def combine(
    output: Tensor, coefficients: Tensor, tensors: Sequence[Tensor], guidance: Tensor, rescales: bool
) -> tuple[Tensor, Tensor]:
    """One step: guidance, and a linear combination of the guided prediction and other tensors.

    Args:
        output: of the denoiser: predictions for the negative prompts and the prompts, ``[2B, C, h, w]``, or for the
            prompts alone, ``[B, C, h, w]``.
        coefficients: of the prediction, then of each of ``tensors``; what is left is padding.
        tensors: the latents first, ``[B, C, h, w]`` each.
        guidance: scale of guidance and share of its rescaling, ``[2]``.
        rescales: whether to rescale.

    Returns:
        Latents after the step and the guided prediction, ``[B, C, h, w]`` each.
    """
    prediction = output.to(tensors[0].dtype)
    if len(output) != len(tensors[0]):
        unconditional, conditional = prediction.chunk(2)
        prediction = classifier_free_guidance(unconditional, conditional, guidance[0])
        if rescales:
            prediction = rescale_guidance(prediction, conditional, guidance[1])
    latents = coefficients[0] * prediction
    for number, tensor in enumerate(tensors, start=1):
        latents = latents + coefficients[number] * tensor
    # with other strides the next step would compile anew
    return latents.contiguous(), prediction.contiguous()


@dataclass(frozen=True)
class Table:
    """The steps of a schedule, with their coefficients on a device.

    Attributes:
        steps: the steps.
        coefficients: those of ``steps``, ``[N, K]`` with K a multiple of `ALIGNED`.
        input_scales: those of ``steps``; None if all are 1.
    """

    steps: LinearSteps
    coefficients: Tensor
    input_scales: Tensor | None

    @classmethod
    def of(cls, steps: LinearSteps, device: torch.device) -> Table:
        """The steps with their coefficients on ``device``."""
        padding = -steps.coefficients.shape[1] % ALIGNED
        scales = None if (steps.input_scales == 1).all() else upload(steps.input_scales, device)
        return cls(steps, upload(F.pad(steps.coefficients, (0, padding)), device), scales)


class FusedSteps:
    """The steps of one batch, one after the other; a `sampler.StepFunction`.

    Args:
        combine: `combine`, compiled.
        table: of the schedule.
        guidance: scale of guidance and share of its rescaling.
    """

    def __init__(self, combine: Callable[..., Any], table: Table, guidance: tuple[float, float]) -> None:
        self._combine, self._table = combine, table
        self._guidance = upload(torch.tensor(guidance), table.coefficients.device)
        self._rescales = guidance[1] > 0
        self._done = 0
        self._own: Tensor  # what the step before returned
        self._nothing: Tensor  # zeros, for a step that draws no noise
        # of the steps so far, the latest first
        self._latents: deque[Tensor] = deque(maxlen=1 + max(table.steps.latent_lags, default=0))
        self._predictions: deque[Tensor] = deque(maxlen=max(table.steps.prediction_lags, default=0))

    @property
    def draws(self) -> bool:
        """Whether the next step needs noise."""
        return self._table.steps.draws[self._done]

    def scaled(self, latents: Tensor) -> Tensor:
        """What the denoiser is given of latents ``[B, C, h, w]``."""
        scales = self._table.input_scales
        return latents if scales is None else latents * scales[self._done]

    def __call__(self, output: Tensor, latents: Tensor, noise: Tensor | None) -> Tensor:
        """Latents after the step, ``[B, C, h, w]``.

        Args:
            output: of the denoiser, ``[2B, C, h, w]`` if guided, else ``[B, C, h, w]``.
            latents: before the step, ``[B, C, h, w]``.
            noise: of the same shape, if the step `draws`.
        """
        steps = self._table.steps
        if not self._done:
            self._begin(latents)
        self._latents.appendleft(latents.contiguous())
        tensors = [self._latents[lag] for lag in steps.latent_lags]
        tensors += [self._predictions[lag - 1] for lag in steps.prediction_lags]
        if steps.own:
            tensors.append(self._own)
        if any(steps.draws):
            tensors.append(self._nothing if noise is None else noise)
        row = self._table.coefficients[self._done]
        latents, prediction = self._combine(output, row, tensors, self._guidance, self._rescales)
        self._predictions.appendleft(prediction)
        if steps.own:
            self._own = latents.clone()  # which a callback may change in place
        self._done += 1
        return latents

    def _begin(self, latents: Tensor) -> None:
        """Put zeros where there is nothing yet: each a tensor of its own, since one given twice would compile anew."""
        for latest in (self._latents, self._predictions):
            latest.extend(_zeros(latents) for _ in range(latest.maxlen or 0))
        self._own, self._nothing = _zeros(latents), _zeros(latents)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


class StepFusion:
    """Fuses the steps of a denoiser's batches, and keeps the coefficients of each schedule.

    Attributes:
        combine: `combine`, compiled; None while steps run as they are.
    """

    def __init__(self) -> None:
        self.combine: Callable[..., Any] | None = None
        self._tables: dict[Any, Table | None] = {}

    def table(self, scheduler: Any, timesteps: Tensor, eta: float, device: torch.device) -> Table | None:
        """The steps of a scheduler; None if they are not linear."""
        sigmas = getattr(scheduler, "sigmas", None)
        begin = getattr(scheduler, "begin_index", None)
        levels = None if sigmas is None else tuple(sigmas.tolist())
        key = (scheduler.to_json_string(), tuple(timesteps.tolist()), levels, begin, eta, device)
        if key not in self._tables:
            if len(self._tables) == MOST_TABLES:
                self._tables.clear()
            steps = linear_steps(scheduler, timesteps, **step_arguments(scheduler, eta, torch.Generator()))
            self._tables[key] = None if steps is None else Table.of(steps, device)
        return self._tables[key]


_fusions: WeakKeyDictionary[nn.Module, StepFusion] = WeakKeyDictionary()


@contextmanager
def fusing_steps(unet: nn.Module, compile: Callable[..., Any]) -> Iterator[None]:
    """Let `fused_steps` fuse the steps of a UNet inside a ``with`` block.

    Args:
        unet: the denoiser.
        compile: compiles a function.
    """
    fusion = _fusions.setdefault(unet, StepFusion())
    fusion.combine = compile(combine)
    try:
        yield
    finally:
        fusion.combine = None


def fused_steps(
    unet: Any, scheduler: Any, timesteps: Tensor, eta: float, guidance: tuple[float, float], device: torch.device
) -> FusedSteps | None:
    """The steps of a batch; None if they run as they are, or are not linear, as with clipped samples.

    Args:
        unet: the denoiser.
        scheduler: before its first step.
        timesteps: of the steps.
        eta: see `sampler.denoise`.
        guidance: scale of guidance and share of its rescaling.
        device: of the latents.
    """
    fusion = _fusions.get(unet)
    if fusion is None or fusion.combine is None:
        return None
    table = fusion.table(scheduler, timesteps, eta, device)
    return None if table is None else FusedSteps(fusion.combine, table, guidance)
