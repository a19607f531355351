"""Stable Diffusion for people who live in PyTorch Lightning and Hydra."""

from __future__ import annotations

from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule

__version__ = "0.1.0"
__all__ = ["SettingsError", "StableDiffusionModule", "__version__"]
