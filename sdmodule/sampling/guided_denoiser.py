"""The guided model of one batch: what it is asked at each step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from sdmodule.conditioning.control import ControlGuide
from sdmodule.diffusion.guidance import classifier_free_guidance, rescale_guidance
from sdmodule.speed.steps import StepPlan


@dataclass
class GuidedDenoiser:
    """A UNet, the text of a batch of B images, and what each step does.

    Attributes:
        unet: predicts for noisy latents.
        text: embeddings of the prompts, behind those of the negative prompts if any step is guided,
            ``[B or 2B, L, D]``.
        steps: what each call does.
        scale: strength of guidance.
        correction: share of the correction of its overexposure.
        seen: makes what the UNet is given of latents.
        start_merging: told the number of a call before it.
        start_caching: told before a call whether it runs all of the UNet.
        control: a ControlNet with the images that it follows.
    """

    unet: Any
    text: Tensor
    steps: Sequence[StepPlan]
    scale: float
    correction: float
    seen: Callable[[Tensor], Tensor]
    start_merging: Callable[[int], None]
    start_caching: Callable[[bool], None]
    control: ControlGuide | None = None
    _calls: Any = field(default_factory=count, init=False, repr=False)

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The prediction for latents ``[B, C, h, w]``, of the same shape."""
        call = next(self._calls)
        guided, fresh = self.steps[call]
        self.start_merging(call)
        self.start_caching(fresh)
        if not guided:
            return self._ask(latents, timestep)
        unconditional, conditional = self._ask(torch.cat([latents, latents]), timestep).chunk(2)
        prediction = classifier_free_guidance(unconditional, conditional, self.scale)
        return rescale_guidance(prediction, conditional, self.correction) if self.correction else prediction

    def _ask(self, latents: Tensor, timestep: Tensor) -> Tensor:
        text, seen = self.text[-len(latents) :], self.seen(latents)
        residuals = {} if self.control is None else self.control.residuals(seen, timestep, text)
        return self.unet(seen, timestep, encoder_hidden_states=text, **residuals).sample
