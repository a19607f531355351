"""Create and load a ControlNet (Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models")."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import ControlNetModel, T2IAdapter
from torch import nn

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


def load_controlnets(paths: str | Sequence[str], parts: Components) -> nn.Module:
    """Load a ControlNet, or a ``ModuleList`` of several.

    Raises:
        SettingsError: as `load_controlnet` does.
    """
    if isinstance(paths, str):
        return load_controlnet(paths, parts)
    nets = [load_controlnet(path, parts) for path in paths]
    return nets[0] if len(nets) == 1 else nn.ModuleList(nets)


def load_controlnet(path: str, parts: Components) -> ControlNetModel | T2IAdapter:
    """Load a ControlNet or T2I-Adapter from a folder or a hub id, frozen and in evaluation mode.

    Raises:
        SettingsError: if it cannot be read, or was made for another architecture than the UNet's.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir() and not is_hub_id(path):
        raise SettingsError(
            f"controlnet={path}: not found; give a folder of a ControlNet, or a hub id such as owner/name."
        )
    location = folder if folder.is_dir() else path
    try:
        if ControlNetModel.load_config(location).get("_class_name") == "T2IAdapter":
            network: Any = load_network(T2IAdapter, location)
        else:
            network = load_network(ControlNetModel, location, parts.family.other_inputs.get("unet"))
    except Exception as error:  # a broken file raises many kinds
        reason = " ".join(str(error).split())[:300]
        raise SettingsError(
            f"controlnet={path}: cannot be read ({reason}); give a diffusers folder of a ControlNet, or a hub id."
        ) from error
    _check_architecture(network, path, parts)
    return network.eval().requires_grad_(False)


def _check_architecture(network: Any, path: str, parts: Components) -> None:
    unet = {
        name: list(np.atleast_1d(parts.unet.config[name])) for name in ("cross_attention_dim", "block_out_channels")
    }
    if isinstance(network, T2IAdapter):
        width = len(unet["block_out_channels"])
        found = {"block_out_channels": list(network.config.channels)[:width]}
        if parts.family.takes_sizes != network.config.adapter_type.endswith("_xl"):
            found["block_out_channels"] = [network.config.adapter_type]
    else:
        found = {name: list(np.atleast_1d(network.config[name])) for name in unet}
    for name, value in found.items():
        if value != unet[name]:
            raise SettingsError(
                f"controlnet={path}: {name} is {value}, and {unet[name]} in the UNet of pretrained={parts.source}; "
                f"give one for {parts.family.title} of this architecture."
            )
