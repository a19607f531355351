"""Create and load a ControlNet (Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models")."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from diffusers import ControlNetModel

from sdmodule.components.checkpoint import Components
from sdmodule.components.load_network import load_network
from sdmodule.components.source import is_hub_id
from sdmodule.errors import SettingsError

EMBEDDING_CHANNELS = (16, 32, 96, 256)
"""Widths of the layers that embed the control image, each halving its height and width down to the latents' size."""


def controlnet_from_unet(parts: Components) -> ControlNetModel:
    """Create a ControlNet from the UNet's encoder, with zero convolutions: it adds nothing yet (section 3.1)."""
    halvings = len(parts.vae.config.block_out_channels) - 1
    channels = EMBEDDING_CHANNELS[: halvings + 1]
    return ControlNetModel.from_unet(parts.unet, conditioning_embedding_out_channels=channels)


def load_controlnet(path: str, parts: Components) -> ControlNetModel:
    """Load a ControlNet from a folder or a hub id, frozen and in evaluation mode.

    Raises:
        SettingsError: if it cannot be read, or was made for another architecture than the UNet's.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir() and not is_hub_id(path):
        raise SettingsError(
            f"controlnet={path}: not found; give a folder of a ControlNet, or a hub id such as owner/name."
        )
    try:
        controlnet = load_network(ControlNetModel, folder if folder.is_dir() else path)
    except Exception as error:  # a broken file raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise SettingsError(
            f"controlnet={path}: cannot be read ({reason}); give a diffusers folder of a ControlNet, or a hub id."
        ) from error
    for name in ("cross_attention_dim", "block_out_channels"):
        expected, found = (list(np.atleast_1d(model.config[name])) for model in (parts.unet, controlnet))
        if expected != found:
            raise SettingsError(
                f"controlnet={path}: {name} is {found}, and {expected} in the UNet of pretrained={parts.source}; give "
                "one that was trained on a model of this architecture."
            )
    return controlnet.eval().requires_grad_(False)
