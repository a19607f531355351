"""Settings of a training that belong to no narrower group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sdmodule.errors import SettingsError, build_settings, check_choice, check_seed
from sdmodule.speed.compile import COMPILE
from sdmodule.training.activation_checkpointing import CHECKPOINTING
from sdmodule.training.inpaint import InpaintTraining


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training.

    Args:
        seed: seed of timesteps, noise and caption dropout.
        scratch: parts that start from random weights: ``unet``, ``text_encoder``, ``text_encoder_2``.
        compile: what ``torch.compile`` compiles of the UNet: ``none``, ``blocks`` (each on its own) or ``whole``.
        checkpointing: activations that the backward pass recomputes: ``none``, ``outer`` (the blocks of full
            resolution) or ``all``.
        inpaint: how a UNet is trained to inpaint; see `InpaintTraining`.

    Raises:
        SettingsError: for a value out of range.
    """

    seed: int = 0
    scratch: Sequence[str] = ()
    compile: str = "none"
    checkpointing: str = "none"
    inpaint: InpaintTraining = field(default_factory=InpaintTraining)

    def __post_init__(self) -> None:
        check_seed("training.seed", self.seed)
        if isinstance(self.scratch, str):
            raise SettingsError(f"scratch={self.scratch}: must be a list; give scratch=[{self.scratch}].")
        check_choice("training.compile", self.compile, COMPILE)
        check_choice("training.checkpointing", self.checkpointing, CHECKPOINTING)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any] | None) -> TrainingSettings:
        """Settings from a mapping whose ``inpaint`` is a mapping too.

        Raises:
            SettingsError: for an unknown setting or a value out of range.
        """
        own = build_settings(cls, "training", settings)
        if isinstance(own.inpaint, InpaintTraining):
            return own
        return replace(own, inpaint=build_settings(InpaintTraining, "training.inpaint", own.inpaint))

    def lasting(self) -> dict[str, Any]:
        """The settings that a checkpoint keeps, in plain types: not how fast its training ran."""
        return {"seed": self.seed, "inpaint": asdict(self.inpaint)}

    def inpaint_for(self, uses_masks: bool) -> InpaintTraining | None:
        """How to train to inpaint; None for a task without masks.

        Raises:
            SettingsError: if settings for inpainting were given for a task without masks.
        """
        if not uses_masks and self.inpaint != InpaintTraining():
            raise SettingsError(f"{self.inpaint}: model=text2image uses no masks; use model=inpaint, or leave it out.")
        return self.inpaint if uses_masks else None
