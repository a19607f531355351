"""The denoising loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""Takes noisy latents ``[B, C, h, w]`` and a timestep (a scalar); returns the UNet's guided prediction."""


def seed_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator an image, so that an image depends on its own seed and on nothing else in its batch."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def draw_latents(shape: tuple[int, int, int], sources: Sequence[torch.Generator], like: Tensor) -> Tensor:
    """Standard normal noise ``[B, *shape]``, row k from ``sources[k]``, with the device and dtype of ``like``."""
    rows = [torch.randn((1, *shape), generator=source, dtype=like.dtype) for source in sources]
    return torch.cat(rows).to(like.device)


def denoise(
    predict: Denoiser,
    latents: Tensor,
    scheduler: Any,
    sources: Sequence[torch.Generator],
    eta: float = 0.0,
    *,
    skipped: int = 0,
    keep: Callable[[Tensor, Tensor | None], Tensor] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Walk from noise to an image's latents (algorithm 2 of Ho et al. 2020, with the scheduler's own update).

    Args:
        predict: the guided model.
        latents: where to start, as noisy as the first timestep, ``[B, C, h, w]``.
        scheduler: a scheduler of diffusers with its timesteps set.
        sources: one generator an image, for schedulers that add noise as they go.
        eta: share of DDPM noise in DDIM (Song et al. 2021, equation 16); other schedulers have none.
        skipped: timesteps at the noisy end that are left out.
        keep: changes the latents after each step, told which timestep comes next, None after the last.
        on_step: called with the number of steps done and the latents after each step.

    Returns:
        Latents ``[B, C, h, w]``.
    """
    accepted = inspect.signature(scheduler.step).parameters
    extra = {k: v for k, v in {"eta": eta, "generator": list(sources)}.items() if k in accepted}
    timesteps = scheduler.timesteps[skipped:]
    for index, timestep in enumerate(timesteps):
        prediction = predict(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(prediction, timestep, latents, **extra, return_dict=False)[0]
        if keep is not None:
            latents = keep(latents, timesteps[index + 1] if index + 1 < len(timesteps) else None)
        if on_step is not None:
            on_step(index + 1, latents)
    return latents
