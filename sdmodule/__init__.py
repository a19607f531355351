"""Stable Diffusion for people who live in PyTorch Lightning and Hydra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdmodule.errors import SettingsError

if TYPE_CHECKING:
    from sdmodule.module import StableDiffusionModule

__version__ = "0.1.0"
__all__ = ["SettingsError", "StableDiffusionModule", "__version__"]

# where ``python -m sdmodule`` finds its __main__
__path__.append(str(Path(__file__).parent / "cli" / "as_module"))


def __getattr__(name: str) -> Any:
    """Import the module when it is asked for: torch and diffusers take seconds, and ``--help`` needs neither."""
    if name == "StableDiffusionModule":
        from sdmodule.module import StableDiffusionModule

        return StableDiffusionModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
