"""Load a refiner, which denoises the last steps after another model."""

from __future__ import annotations

from sdmodule.components.checkpoint import Components, load_part
from sdmodule.components.source import find_source
from sdmodule.errors import SettingsError


def load_refiner(path: str, base: Components) -> Components:
    """Load a refiner; its VAE is that of the base model, since both share the latents.

    Args:
        path: a diffusers folder or a hub id.
        base: the model that samples before it.

    Raises:
        SettingsError: if it is another model, or does not go with the base model.
    """
    source = find_source(path, key="refiner")
    family = source.family
    if not family.refines:
        raise SettingsError(f"refiner={path}: is a checkpoint of {family.title}; give one of a refiner.")
    if not base.family.refinable:
        raise SettingsError(
            f"refiner={path}: is {family.title}, and pretrained={base.source} is a checkpoint of {base.family.title}; "
            "leave it out."
        )
    parts = {name: load_part(name, path, key="refiner", family=family) for name in family.parts if name != "vae"}
    return Components(
        **{"text_encoder": None, "tokenizer": None} | parts,
        vae=base.vae,
        source=path,
        guidance_scale=base.guidance_scale,
        family=family,
        zero_empty_prompts=family.zeroes_empty_prompts(source.index),
    )
