"""How images are sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

from sdmodule.conditioning.control_settings import ControlSettings
from sdmodule.conditioning.inpaint_crop import InpaintSettings
from sdmodule.errors import SettingsError, build_settings, check_int, check_number, choices, is_int, is_number
from sdmodule.sampling.freeu import FreeU
from sdmodule.sampling.hires import Hires
from sdmodule.sampling.size_conditions import SizeConditions
from sdmodule.speed.speed_settings import EXACT, SpeedSettings
from sdmodule.tome.token_merging import OFF, TokenMerging, choose_merging

USUAL_STRENGTH = {"image2image": 0.8}
"""Strength of each task if none is given; 1, for any other."""


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled.

    Args:
        scheduler: a scheduler's name or settings (see ``make_scheduler``); the checkpoint's own if None.
        steps: denoising steps.
        timesteps: the timesteps of the steps, from noise to image, instead of ``steps``.
        sigmas: their noise levels instead, likewise.
        denoising_start: share of the schedule that an earlier model has denoised, from 0 to 1; of an image, which is
            then taken for noisy latents.
        denoising_end: share of the schedule to stop at; a later model denoises the rest.
        guidance_scale: strength of classifier-free guidance, 1 or less is none; the checkpoint's own if None.
        guidance_rescale: share of the correction for overexposure by guidance; None takes 0.7 for a model of zero
            terminal SNR and 0 for any other.
        eta: share of DDPM noise in DDIM, 0 to 1.
        height: pixels; the checkpoint's own size, or for image-to-image the aspect ratio of the image, if None.
        width: likewise.
        clip_skip: last layers of the text encoder that the prompt is taken from before; 0 skips none.
        sizes: what Stable Diffusion XL is told of sizes.
        freeu: factors of FreeU, or None.
        hires: a second pass at a larger size.
        refiner_start: share of the schedule after which the refiner takes over, if there is one.
        ip_adapter_scale: how much the image of an IP-Adapter counts beside the text.
        control: how ControlNets guide.
        inpaint: how masked images are inpainted; its strength is that of image-to-image too.
        merging: token merging; off unless its ratio is greater than 0.
        speed: what is done to sample faster; nothing that changes an image unless given.

    Raises:
        SettingsError: for a value out of range.
    """

    scheduler: str | Mapping[str, Any] | None = None
    steps: int = 50
    timesteps: Sequence[int] | None = None
    sigmas: Sequence[float] | None = None
    denoising_start: float | None = None
    denoising_end: float | None = None
    guidance_scale: float | None = None
    guidance_rescale: float | None = None
    eta: float = 0.0
    height: int | None = None
    width: int | None = None
    clip_skip: int = 0
    sizes: SizeConditions = field(default_factory=SizeConditions)
    freeu: FreeU | None = None
    hires: Hires = field(default_factory=Hires)
    refiner_start: float = 0.8
    ip_adapter_scale: float = 1.0
    control: ControlSettings = field(default_factory=ControlSettings)
    inpaint: InpaintSettings = field(default_factory=InpaintSettings)
    merging: TokenMerging = OFF
    speed: SpeedSettings = EXACT

    def __post_init__(self) -> None:
        check_int("steps", self.steps)
        check_number("eta", self.eta, minimum=0, maximum=1)
        check_int("clip_skip", self.clip_skip, minimum=0)
        check_number("ip_adapter_scale", self.ip_adapter_scale, minimum=0, maximum=100)
        check_number("refiner_start", self.refiner_start, above=0, below=1)
        if self.guidance_scale is not None:
            check_number("guidance_scale", self.guidance_scale, above=-1e4, below=1e4)
        if self.guidance_rescale is not None:
            check_number("guidance_rescale", self.guidance_rescale, minimum=0, maximum=1)
        self._check_window()
        self._check_schedule()

    @classmethod
    def from_groups(
        cls,
        sampling: Mapping[str, Any] | None = None,
        tome: Mapping[str, Any] | None = None,
        speed: Mapping[str, Any] | None = None,
        task: str = "text2image",
    ) -> SamplingSettings:
        """Settings from the groups ``sampling`` (with ``inpaint`` inside), ``tome`` and ``speed``.

        Args:
            sampling: the settings of this class; those of a nested one stand beside them: ``control_scale``,
                ``original_size``, ``hires_strength`` and so on.
            tome: token merging.
            speed: what is done to sample faster.
            task: says the usual strength.

        Raises:
            SettingsError: for an unknown setting or a value out of range.
        """
        if sampling is not None and not isinstance(sampling, Mapping):
            raise SettingsError(f"sampling={sampling!r}: must be settings such as sampling={{steps: 30}}.")
        optional = {"inpaint", "freeu", *(name for _, names in NESTED.values() for name in names)}
        given = {name: value for name, value in (sampling or {}).items() if value is not None or name not in optional}
        nested = {name: _nested(kind, names, given) for name, (kind, names) in NESTED.items()}
        inpaint = given.pop("inpaint", None)
        if not isinstance(inpaint, InpaintSettings):
            inpaint = inpaint_settings(inpaint, task)
        freeu = given.pop("freeu", None)
        beside = [name for _, names in NESTED.values() for name in names]
        own = build_settings(cls, "sampling", given, ("merging", "speed", *NESTED), beside)  # groups of their own
        return replace(
            own,
            **nested,
            inpaint=inpaint,
            freeu=freeu_of(freeu),
            merging=choose_merging(tome),
            speed=build_settings(SpeedSettings, "speed", speed),
        )

    @property
    def steps_asked(self) -> int:
        """Denoising steps of the whole schedule."""
        by_hand = self.timesteps or self.sigmas
        return self.steps if by_hand is None else len(by_hand)

    @property
    def steps_taken(self) -> int:
        """Denoising steps that are run: fewer than all where the strength is below 1."""
        return int(self.steps_asked * self.inpaint.strength)

    def with_nested(self, given: Mapping[str, Any]) -> SamplingSettings:
        """These settings with those of nested classes that are given by the names that users see.

        Raises:
            SettingsError: for an unknown name or a value out of range.
        """
        if unknown := set(given) - {name for _, names in NESTED.values() for name in names}:
            raise SettingsError(f"{choices(unknown)}: unknown; see the arguments of infer.")
        changes = {
            group: {inner: given[name] for name, inner in names.items() if name in given}
            for group, (_, names) in NESTED.items()
        }
        return replace(self, **{name: replace(getattr(self, name), **new) for name, new in changes.items() if new})

    def updated(self, **changes: Any) -> SamplingSettings:
        """These settings with those of ``changes`` that are not None."""
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    def unusual(self) -> dict[str, Any]:
        """Rarer settings that differ from their defaults, in plain types, as the configuration names them."""
        said: dict[str, Any] = {}
        if self.timesteps is not None:
            said["timesteps"] = list(self.timesteps)
        if self.sigmas is not None:
            said["sigmas"] = list(self.sigmas)
        shares = {"denoising_start": self.denoising_start, "denoising_end": self.denoising_end}
        said |= {name: share for name, share in shares.items() if share is not None}
        if self.clip_skip:
            said["clip_skip"] = self.clip_skip
        said |= self.sizes.given
        if self.freeu is not None:
            said["freeu"] = {one.name: getattr(self.freeu, one.name) for one in fields(self.freeu)}
        if self.hires.scale > 1:
            hires = self.hires
            said |= {"hires": hires.scale, "hires_strength": hires.strength, "hires_upscale": hires.upscale}
        return said

    def _check_window(self) -> None:
        start, end = self.denoising_start, self.denoising_end
        for name, share in (("denoising_start", start), ("denoising_end", end)):
            if share is not None:
                check_number(name, share, above=0, below=1)
        if start is not None and end is not None and start >= end:
            raise SettingsError(f"denoising_start={start}, denoising_end={end}: the start must be before the end.")

    def _check_schedule(self) -> None:
        if self.timesteps is not None and self.sigmas is not None:
            raise SettingsError("timesteps, sigmas: exclude each other; give one of them.")
        for name, values, fits in (("timesteps", self.timesteps, is_int), ("sigmas", self.sigmas, is_number)):
            if values is None:
                continue
            listed = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
            if not listed or not all(fits(one) and one >= 0 for one in values):
                kind = "whole numbers" if name == "timesteps" else "numbers"
                raise SettingsError(f"{name}={values}: must be {kind} of at least 0, from noise to image.")
            if any(after >= before for before, after in pairwise(values)):
                raise SettingsError(f"{name}={list(values)}: must decrease, from noise to image.")
            object.__setattr__(self, name, tuple(values))


def inpaint_settings(given: Any, task: str) -> InpaintSettings:
    """Settings of inpainting and image-to-image from a mapping, with the usual strength of the task if none is given.

    Raises:
        SettingsError: as `build_settings` does.
    """
    changed = {k: v for k, v in given.items() if v is not None} if isinstance(given, Mapping) else given
    settings = build_settings(InpaintSettings, "sampling.inpaint", changed)
    return settings if changed and "strength" in changed else replace(settings, strength=USUAL_STRENGTH.get(task, 1.0))


def freeu_of(given: Any) -> FreeU | None:
    """FreeU of its factors, or none.

    Raises:
        SettingsError: for anything else.
    """
    return given if given is None or isinstance(given, FreeU) else build_settings(FreeU, "freeu", given)


NESTED: dict[str, tuple[Any, dict[str, str]]] = {
    "sizes": (SizeConditions, {one.name: one.name for one in fields(SizeConditions)}),
    "hires": (Hires, {"hires": "scale", "hires_strength": "strength", "hires_upscale": "upscale"}),
    "control": (
        ControlSettings,
        {
            "control_scale": "scale",
            "control_guidance_start": "start",
            "control_guidance_end": "end",
            "guess_mode": "guess_mode",
        },
    ),
}
"""Settings of nested classes, which users see beside the others: each class with its settings by those names."""


def _nested(kind: Any, names: Mapping[str, str], given: dict[str, Any]) -> Any:
    """A nested class of the settings that are given for it, which are taken out."""
    return kind(**{inner: given.pop(name) for name, inner in names.items() if name in given})
