"""How images are sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sdmodule.conditioning.inpaint_crop import InpaintSettings
from sdmodule.errors import SettingsError
from sdmodule.speed.speed_settings import EXACT, SpeedSettings
from sdmodule.tome.token_merging import OFF, TokenMerging


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled.

    Args:
        scheduler: a scheduler's name or settings (see ``make_scheduler``); the checkpoint's own if None.
        steps: denoising steps.
        guidance_scale: strength of classifier-free guidance, 1 or less is none; the checkpoint's own if None.
        guidance_rescale: share of the correction of guidance's overexposure; None takes 0.7 for a model of zero
            terminal SNR and 0 for any other.
        eta: share of DDPM noise in DDIM, 0 to 1.
        height: pixels; the checkpoint's own size if None.
        width: pixels; the checkpoint's own size if None.
        merging: token merging; off unless its ratio is more than 0.
        inpaint: how masked images are repainted.
        control_scale: how much a ControlNet counts; 0 is not at all.
        speed: means of sampling faster; none that changes an image unless given.

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
    merging: TokenMerging = OFF
    inpaint: InpaintSettings = field(default_factory=InpaintSettings)
    control_scale: float = 1.0
    speed: SpeedSettings = EXACT

    def __post_init__(self) -> None:
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise SettingsError(f"steps={self.steps!r} is not allowed; give a whole number of at least 1.")
        for name in ("eta", "control_scale", "guidance_scale", "guidance_rescale"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) and not (value is None and "guidance" in name):
                raise SettingsError(f"{name}={value} is not allowed; give a number.")
        if not 0.0 <= self.eta <= 1.0:
            raise SettingsError(f"eta={self.eta} is not allowed; give a number from 0 to 1.")
        if not 0.0 <= self.control_scale <= 100.0:
            raise SettingsError(f"control_scale={self.control_scale} is not allowed; give a number from 0 to 100.")
        if self.guidance_scale is not None and not -1e4 < self.guidance_scale < 1e4:
            raise SettingsError(f"guidance_scale={self.guidance_scale} is not allowed; give a number such as 7.5.")
        if self.guidance_rescale is not None and not 0.0 <= self.guidance_rescale <= 1.0:
            raise SettingsError(f"guidance_rescale={self.guidance_rescale} is not allowed; give a number from 0 to 1.")

    @property
    def steps_taken(self) -> int:
        """Steps that are walked: fewer than ``steps`` where the strength is below 1."""
        return int(self.steps * self.inpaint.strength)

    def updated(self, **changes: Any) -> SamplingSettings:
        """These settings with those of ``changes`` that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})
