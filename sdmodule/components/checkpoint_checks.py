"""What a checkpoint must be beside readable, and the guidance scale that it recommends."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sdmodule.components.source import is_single_file, local_folder
from sdmodule.errors import SettingsError, choices
from sdmodule.families.family import Family

SAMPLING = "sampling.json"
"""File in a checkpoint's folder with its recommended guidance scale; diffusers ignores it."""


def check_latents(vae: Any, pretrained: str) -> None:
    """Check that the VAE's latents are scaled by one factor, and not shifted as well."""
    if vae.config.get("latents_mean") or vae.config.get("latents_std"):
        raise SettingsError(
            f"pretrained={pretrained}: its VAE shifts latents channel by channel (latents_mean), as Playground's does; "
            "only VAEs with a scaling_factor alone are supported."
        )


def check_widths(parts: Mapping[str, Any], family: Family, pretrained: str) -> None:
    """Check that the UNet attends to what the text encoders say."""
    widths = [parts[name].config.hidden_size for name in family.text_encoders.values()]
    wanted_width, width = parts["unet"].config.cross_attention_dim, sum(widths)
    if wanted_width == width:
        return
    whose = "text encoder's" if len(widths) == 1 else "text encoders' joined"
    raise SettingsError(
        f"pretrained={pretrained}: the {whose} hidden states are {width} wide and the UNet attends to "
        f"{wanted_width}; give components.text_encoder and components.unet that belong together."
    )


def check_whole_file(
    path: str,
    scratch: Iterable[str] = (),
    revision: str | None = None,
    variant: str | None = None,
    key: str = "pretrained",
) -> None:
    """Check that nothing is asked of a single file that only folders and hub ids have.

    Raises:
        SettingsError: if it is.
    """
    if scratch := list(scratch):
        raise SettingsError(
            f"scratch={choices(scratch)}: {key}={path} is a single file, which has no configuration to make random "
            "parts of; give a diffusers folder."
        )
    for name, value in (("revision", revision), ("variant", variant)):
        if value:
            raise SettingsError(f"{name}={value}: {key}={path} is a single file and has no {name}; leave it out.")


def default_guidance(pretrained: str, family: Family) -> float:
    """Guidance scale of a local checkpoint's ``sampling.json``, or its family's."""
    folder = local_folder(pretrained)
    file = (folder.with_suffix("") if is_single_file(pretrained) else folder) / SAMPLING
    if not file.is_file():
        return family.guidance_scale
    try:
        return float(json.loads(file.read_text())["guidance_scale"])
    except (ValueError, KeyError, TypeError) as error:
        raise SettingsError(
            f'pretrained={pretrained}: {file} cannot be read ({error}); write {{"guidance_scale": 7.5}}, or remove it.'
        ) from error
