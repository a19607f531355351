"""Train a ControlNet; the UNet stays frozen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from lightning import Trainer

from sdmodule.components.checkpoint import Components
from sdmodule.components.controlnet import controlnet_from_unet
from sdmodule.components.save import save_model
from sdmodule.training.text_encoder import freeze_text_encoders


@dataclass(frozen=True)
class ControlNetTuning:
    """Train a copy of the UNet's encoder that also takes a control image (Zhang et al. 2023)."""

    kind: ClassVar[str] = "controlnet"
    layouts: ClassVar[tuple[str, ...]] = ("diffusers",)
    usual_optimizer: ClassVar[dict[str, float]] = {"lr": 1e-5}  # the copied encoder already understands images
    from_scratch: ClassVar[set[str]] = set()
    text_encoder_lr: ClassVar[None] = None

    def text_encoder_learns(self, step: int) -> bool:
        """Never: the text encoder is frozen."""
        return False

    def check_trainer(self, trainer: Trainer | None) -> None:
        """Any trainer works."""

    def prepare(self, parts: Components, seed: int) -> None:
        """Add a ControlNet, its new layers initialized from ``seed``, and freeze everything else."""
        parts.unet.requires_grad_(False)
        freeze_text_encoders(parts)
        with torch.random.fork_rng(devices=[]):  # layers are made on the CPU; GPUs are none of its business
            torch.default_generator.manual_seed(seed)
            parts.controlnet = controlnet_from_unet(parts).requires_grad_(True)

    def export(self, parts: Components, folder: str | Path, dtype: str, layout: str) -> None:
        """Write a folder that ``ControlNetModel.from_pretrained`` loads."""
        save_model(parts.controlnet, folder, dtype)
