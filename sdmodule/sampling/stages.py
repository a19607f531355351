"""The passes of a sampling: the model, and after it a refiner, or the model again at a larger size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError
from sdmodule.sampling.conditions import Given
from sdmodule.sampling.hires import enlarge
from sdmodule.sampling.requests import SampleRequest
from sdmodule.sampling.schedule import image_size, sampling_schedule
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.sampling.stopwatch import Stopwatch


@dataclass(frozen=True)
class Stage:
    """One pass.

    Attributes:
        parts: the model.
        settings: its settings.
        enlarges: whether the latents of the stage before are enlarged first.
    """

    parts: Components
    settings: SamplingSettings
    enlarges: bool = False

    def of(self, requests: Sequence[SampleRequest]) -> list[SampleRequest]:
        """The requests of this stage: a refiner has no ControlNets."""
        if not self.parts.family.refines:
            return list(requests)
        return [replace(request, control=None) for request in requests]

    def continued(self, given: Given, watch: Stopwatch) -> Given:
        """What was given, with the latents of the stage before at this stage's size."""
        if not self.enlarges or given.latents is None or given.generators is None:
            return given
        size, upscale = image_size(self.parts, self.settings), self.settings.hires.upscale
        with watch.stage("upscale"):
            return replace(given, latents=enlarge(self.parts, given.latents, size, upscale, given.generators))


def plan_stages(parts: Components, settings: SamplingSettings) -> list[Stage]:
    """The passes that settings ask for, in their order.

    Raises:
        SettingsError: for a refiner and a larger second pass at once.
    """
    hires, refiner = settings.hires, parts.refiner
    if hires.scale > 1 and refiner is not None:
        raise SettingsError(f"hires={hires.scale}, refiner: exclude each other; give one of them.")
    if refiner is not None:
        share = settings.refiner_start
        return [
            Stage(parts, replace(settings, denoising_end=share)),
            Stage(refiner, replace(settings, denoising_start=share, clip_skip=0, freeu=None)),
        ]
    if hires.scale == 1:
        return [Stage(parts, settings)]
    height, width = hires.enlarged(image_size(parts, settings), parts.pixels_per_latent)
    strength = replace(settings.inpaint, strength=hires.strength)
    return [Stage(parts, settings), Stage(parts, replace(settings, height=height, width=width, inpaint=strength), True)]


def total_steps(parts: Components, settings: SamplingSettings) -> int:
    """Calls of the denoiser for one batch, all stages together."""
    stages = plan_stages(parts, settings)
    return sum(len(sampling_schedule(stage.parts, stage.settings).timesteps) for stage in stages)


def work_ahead(parts: Components, settings: SamplingSettings, images: float) -> float:
    """Denoising steps of ``images`` images, all stages together, counted in images of 512 pixels."""
    each = 0.0
    for stage in plan_stages(parts, settings):
        height, width = image_size(stage.parts, stage.settings)
        each += len(sampling_schedule(stage.parts, stage.settings).timesteps) * height * width / 512**2
    return each * images
