"""Stable Diffusion for people who live in PyTorch Lightning and Hydra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdmodule.errors import SettingsError
from sdmodule.io.lazy import lazy_attribute

if TYPE_CHECKING:
    from sdmodule.module import StableDiffusionModule

__version__ = "0.1.0"
__all__ = ["SettingsError", "StableDiffusionModule", "__version__"]

# where ``python -m sdmodule`` finds its __main__
__path__.append(str(Path(__file__).parent / "cli" / "as_module"))


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, {"StableDiffusionModule": "module"}, name)


def __dir__() -> list[str]:
    return __all__
