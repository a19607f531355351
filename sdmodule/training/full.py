"""Train the whole UNet and, optionally, the text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from lightning import Trainer

from sdmodule.components.checkpoint import Components
from sdmodule.components.save import save_components
from sdmodule.components.write_single_file import save_single_file
from sdmodule.training.text_encoder import TextEncoderTraining


@dataclass(frozen=True)
class FullTuning(TextEncoderTraining):
    """Train every weight of the UNet and, with ``text_encoder``, of the text encoder."""

    kind: ClassVar[str] = "full"
    layouts: ClassVar[tuple[str, ...]] = ("diffusers", "single_file")
    usual_optimizer: ClassVar[dict[str, float]] = {"lr": 1e-5}  # with more, a whole model forgets what it knew

    @property
    def from_scratch(self) -> set[str]:
        """Parts that may start from random weights, because all of their weights are trained."""
        return {"unet", "text_encoder"} if self.text_encoder else {"unet"}

    def check_trainer(self, trainer: Trainer | None) -> None:
        """Any trainer works."""

    def prepare(self, parts: Components, seed: int) -> None:
        """Unfreeze what is trained; there is nothing to initialize from ``seed``."""
        parts.unet.requires_grad_(True)
        parts.text_encoder.train(self.text_encoder).requires_grad_(self.text_encoder)

    def export(self, parts: Components, folder: str | Path, dtype: str, layout: str) -> None:
        """Write a folder that ``StableDiffusionPipeline.from_pretrained`` loads, or ``from_single_file`` its file."""
        (save_single_file if layout == "single_file" else save_components)(parts, folder, dtype)
