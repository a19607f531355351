"""How noisy latents are at a step, as two factors that are known before the first step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class NoiseLevel:
    """Factors of image and noise; scalars on the CPU, which no copy takes to a GPU.

    Attributes:
        image: alpha of the papers.
        noise: sigma.
    """

    image: Tensor
    noise: Tensor

    @classmethod
    def of(cls, scheduler: Any, timesteps: Tensor, begin: int, dtype: torch.dtype) -> NoiseLevel:
        """The level that a scheduler of diffusers adds noise at.

        Args:
            scheduler: before its first step.
            timesteps: the timestep, ``[1]``.
            begin: its index among the scheduler's.
            dtype: of the latents.
        """
        scheduler = copy.copy(scheduler)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(begin)
        one, nothing = torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)
        return cls(scheduler.add_noise(one, nothing, timesteps)[0], scheduler.add_noise(nothing, one, timesteps)[0])

    def noised(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Latents ``[B, C, h, w]`` with noise of the same shape; what ``scheduler.add_noise`` returns, to the bit."""
        return self.image * latents + self.noise * noise
