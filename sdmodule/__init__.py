"""Stable Diffusion for people who live in PyTorch Lightning and Hydra."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdmodule.errors import SettingsError
from sdmodule.io.lazy import lazy_attribute
from sdmodule.version import __version__

if TYPE_CHECKING:
    from sdmodule.module import StableDiffusionModule

__all__ = ["SettingsError", "StableDiffusionModule", "__version__"]


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, {"StableDiffusionModule": "module"}, name)


def __dir__() -> list[str]:
    return __all__
