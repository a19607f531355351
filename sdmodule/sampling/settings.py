"""How images are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sdmodule.conditioning.inpaint_crop import InpaintSettings
from sdmodule.errors import build_settings, check_int, check_number
from sdmodule.speed.speed_settings import EXACT, SpeedSettings
from sdmodule.tome.token_merging import OFF, TokenMerging, choose_merging


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled.

    Args:
        scheduler: a scheduler's name or settings (see ``make_scheduler``); the checkpoint's own if None.
        steps: denoising steps.
        guidance_scale: strength of classifier-free guidance, 1 or less is none; the checkpoint's own if None.
        guidance_rescale: share of the correction for overexposure by guidance; None takes 0.7 for a model of zero
            terminal SNR and 0 for any other.
        eta: share of DDPM noise in DDIM, 0 to 1.
        height: pixels; the checkpoint's own size if None.
        width: pixels; the checkpoint's own size if None.
        control_scale: weight of a ControlNet's residuals; 0 turns it off.
        inpaint: how masked images are inpainted.
        merging: token merging; off unless its ratio is greater than 0.
        speed: what is done to sample faster; nothing that changes an image unless given.

    Raises:
        SettingsError: for a value out of range.
    """

    scheduler: str | Mapping[str, Any] | None = None
    steps: int = 50
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    control_scale: float = 1.0
    inpaint: InpaintSettings = field(default_factory=InpaintSettings)
    merging: TokenMerging = OFF
    speed: SpeedSettings = EXACT

    def __post_init__(self) -> None:
        check_int("steps", self.steps)
        check_number("eta", self.eta, minimum=0, maximum=1)
        check_number("control_scale", self.control_scale, minimum=0, maximum=100)
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale, above=-1e4, below=1e4)
        if self.guidance_rescale is not None:
            check_number("guidance_rescale", self.guidance_rescale, minimum=0, maximum=1)

    @classmethod
    def from_groups(
        cls,
        sampling: Mapping[str, Any] | None = None,
        tome: Mapping[str, Any] | None = None,
        speed: Mapping[str, Any] | None = None,
    ) -> SamplingSettings:
        """Settings from the groups ``sampling`` (with ``inpaint`` inside), ``tome`` and ``speed``.

        Raises:
            SettingsError: for an unknown setting or a value out of range.
        """
        own = build_settings(cls, "sampling", sampling, exclude=("merging", "speed"))  # groups of their own
        inpaint = own.inpaint
        if not isinstance(inpaint, InpaintSettings):
            inpaint = build_settings(InpaintSettings, "sampling.inpaint", inpaint)
        fast = build_settings(SpeedSettings, "speed", speed)
        return replace(own, inpaint=inpaint, merging=choose_merging(tome), speed=fast)

    @property
    def steps_taken(self) -> int:
        """Denoising steps that are run: fewer than ``steps`` where the inpainting strength is below 1."""
        return int(self.steps * self.inpaint.strength)

    def updated(self, **changes: Any) -> SamplingSettings:
        """These settings with those of ``changes`` that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})
