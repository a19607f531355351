"""Initial noise and the denoising loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from sdmodule.diffusion.step_noise import steps_on_device
from sdmodule.diffusion.upload import upload

Generators = torch.Generator | Sequence[torch.Generator]
"""Source of the noise of a batch: one for each image, or one for all."""

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Guided prediction ``[B, C, h, w]`` for noisy latents ``[B, C, h, w]`` and a scalar timestep."""


class StepFunction(Protocol):
    """Takes the steps of a schedule in the place of the scheduler, one after the other."""

    @property
    def draws(self) -> bool:
        """Whether the next step needs noise."""
        ...

    def scaled(self, latents: Tensor) -> Tensor:
        """What the denoiser is given of latents ``[B, C, h, w]``."""
        ...

    def __call__(self, output: Tensor, latents: Tensor, noise: Tensor | None) -> Tensor:
        """Latents after the step ``[B, C, h, w]``, from those before it and what the denoiser returned for them."""
        ...


def seed_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator per image, so that an image depends on its own seed and not on its batch or device."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def draw_latents(shape: tuple[int, ...], generators: Generators, like: Tensor) -> Tensor:
    """Standard normal noise of ``shape`` ``[B, C, h, w]``, with the device and dtype of ``like``.

    Row k is drawn from generator k; a single generator draws all rows at once, as in diffusers' pipelines.
    """
    source = generators if isinstance(generators, torch.Generator) else list(generators)
    drawn_on = source.device if isinstance(source, torch.Generator) else source[0].device
    return upload(randn_tensor(shape, generator=source, device=drawn_on, dtype=like.dtype), like.device)


def step_arguments(scheduler: Any, eta: float, generator: Any) -> dict[str, Any]:
    """Which of ``eta`` and ``generator`` the ``step`` of a scheduler takes."""
    accepted = inspect.signature(scheduler.step).parameters
    return {name: value for name, value in {"eta": eta, "generator": generator}.items() if name in accepted}


def denoise(
    predict: Denoiser,
    latents: Tensor,
    scheduler: Any,
    generators: Generators,
    eta: float = 0.0,
    *,
    timesteps: Tensor | None = None,
    keep: Callable[[Tensor, int], Tensor] | None = None,
    on_step: Callable[[int, Tensor], Tensor | None] | None = None,
    fused: StepFunction | None = None,
) -> Tensor:
    """Denoise latents step by step (Ho et al. 2020, algorithm 2, with the scheduler's update).

    Args:
        predict: guided prediction of the model; gets the timestep on the latents' device.
        latents: initial latents at the noise level of the first timestep, ``[B, C, h, w]``.
        scheduler: a diffusers scheduler with its timesteps set.
        generators: one per image, or one for all, for schedulers that add noise at each step.
        eta: amount of noise in DDIM (Song et al. 2021, equation 16); other schedulers ignore it.
        timesteps: the timesteps to denoise at, a range of the scheduler's; all of them if None.
        keep: changes the latents after each step, given the number of steps done.
        on_step: called after each step with the number of steps done and the latents; it may return others.
        fused: takes the steps instead of ``scheduler``, and may expect more of ``predict`` than a guided prediction.

    Returns:
        Denoised latents ``[B, C, h, w]``.
    """
    source = generators if isinstance(generators, torch.Generator) else list(generators)
    arguments = step_arguments(scheduler, eta, source)
    timesteps = scheduler.timesteps if timesteps is None else timesteps
    on_device = upload(timesteps, latents.device)  # at once; the scheduler takes those on the CPU
    each = [source] if isinstance(source, torch.Generator) else source
    with steps_on_device(scheduler, latents.device, each, len(timesteps)) as stepping:
        for index, timestep in enumerate(timesteps):
            if fused is None:
                prediction = predict(scheduler.scale_model_input(latents, timestep), on_device[index])
                with stepping:
                    latents = scheduler.step(prediction, timestep, latents, **arguments, return_dict=False)[0]
            else:
                output = predict(fused.scaled(latents), on_device[index])
                with stepping:
                    noise = _step_noise(latents, source) if fused.draws else None
                latents = fused(output, latents, noise)
            if keep is not None:
                latents = keep(latents, index + 1)
            if on_step is not None:
                changed = on_step(index + 1, latents)
                latents = latents if changed is None else changed
    return latents


def _step_noise(latents: Tensor, source: Any) -> Tensor:
    """Noise for a step, as a scheduler draws it."""
    return randn_tensor(latents.shape, generator=source, device=latents.device, dtype=latents.dtype)
