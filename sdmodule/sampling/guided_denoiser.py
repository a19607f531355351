"""The denoiser of one batch, guided away from the negative prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.diffusion.guidance import classifier_free_guidance, rescale_guidance
from sdmodule.sampling.conditions import BatchConditions
from sdmodule.speed.compile import any_length
from sdmodule.speed.step_graphs import Slot, StepGraphs, held_tensors


@dataclass
class GuidedDenoiser:
    """A denoiser with the conditions of a batch of B images: takes latents and a timestep, as the denoising loop does.

    Attributes:
        parts: the model.
        conditions: of the batch.
        start_merging: called with the number of each step before it.
        start_caching: called before each step with whether all layers run.
        graphs: recordings of the denoiser's calls, if there are any.
        guides: whether to apply guidance; otherwise a guided step returns the predictions for the negative prompts
            and the prompts, ``[2B, C, h, w]``, in the denoiser's dtype.
    """

    parts: Components
    conditions: BatchConditions
    start_merging: Callable[[int], None]
    start_caching: Callable[[bool], None]
    graphs: StepGraphs | None = None
    guides: bool = True
    _calls: Any = field(default_factory=count, init=False, repr=False)
    _texts: dict[int, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)
    _slots: dict[str, Slot] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.graphs is not None:
            self._slots = held_tensors(self.parts.unet)

    def __call__(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The guided prediction for latents ``[B, C, h, w]``, of the same shape, if it `guides`."""
        call = next(self._calls)
        guided, fresh = self.conditions.steps[call]
        self.start_merging(call)
        self.start_caching(fresh)
        if not guided:
            return self._predict(call, latents, timestep, guided=False)
        scale, rescale = self.conditions.guidance_scale, self.conditions.guidance_rescale
        both = self._predict(call, torch.cat([latents, latents]), timestep, guided=True)
        if not self.guides:
            return both
        unconditional, conditional = both.chunk(2)
        prediction = classifier_free_guidance(unconditional, conditional, scale)
        return rescale_guidance(prediction, conditional, rescale) if rescale else prediction

    def _predict(self, call: int, latents: Tensor, timestep: Tensor, guided: bool) -> Tensor:
        unet, control = self.parts.unet, self.conditions.control
        seen = self.conditions.denoiser_input(latents).to(unet.dtype)
        residuals = {} if control is None else control.residuals(call, seen, timestep, self._told, guided)
        embedding = self.conditions.guidance_embedding
        distilled = {} if embedding is None else {"timestep_cond": embedding}
        given = {**residuals, **self._told(len(seen)), **distilled}
        if self.graphs is None:
            prediction = unet(seen, timestep, **given).sample
        else:
            fresh = self.conditions.steps[call].fresh
            prediction = self.graphs.run(unet, self._slots, fresh, (seen, timestep), given)
        # on a GPU guidance and the scheduler compute in float32, as the latents are kept
        return prediction if prediction.device.type == "cpu" or not self.guides else prediction.float()

    def _told(self, rows: int) -> dict[str, Any]:
        """What the denoiser is told of the last rows of the batch, where the prompts are."""
        if rows not in self._texts:
            text = self.conditions.text[-rows:]
            any_length(text.hidden_states)
            self._texts[rows] = self.parts.family.denoiser_arguments(text)
        return self._texts[rows]
