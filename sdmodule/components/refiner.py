"""Load a refiner, which denoises the last steps after another model."""

from __future__ import annotations

from sdmodule.components.checkpoint import Components, load_part
from sdmodule.components.source import find_source, is_single_file
from sdmodule.errors import SettingsError
from sdmodule.families.recognize import REFINER


def load_refiner(path: str, base: Components) -> Components:
    """Load a refiner; its VAE is that of the base model, since both share the latents.

    Args:
        path: a diffusers folder, a hub id, or a single file of the original layout.
        base: the model that samples before it.

    Raises:
        SettingsError: if it is another model, or does not go with the base model.
    """
    source = None if is_single_file(path) else find_source(path, key="refiner")
    family = REFINER if source is None else source.family
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
        zero_empty_prompts=source is not None and family.zeroes_empty_prompts(source.index),
    )
