"""Which family a checkpoint is of, by what its index says, before any weight is read."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from sdmodule.errors import SettingsError
from sdmodule.families.family import Family
from sdmodule.families.stable_diffusion import StableDiffusion
from sdmodule.families.stable_diffusion_xl import StableDiffusionXL
from sdmodule.families.stable_diffusion_xl_refiner import StableDiffusionXLRefiner

STABLE_DIFFUSION = StableDiffusion()
REFINER = StableDiffusionXLRefiner()
FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION, StableDiffusionXL(), REFINER)


OTHER_MODELS = {
    "joint_blocks.": "Stable Diffusion 3",
    "distilled_guidance_layer.": "Chroma",
    "double_blocks.": "Flux",
    "double_layers.": "AuraFlow",
    "y_embedder.y_embedding": "PixArt or Sana",
    ".img_mod.": "Qwen-Image",
    "cap_embedder.": "Lumina or Z-Image",
    "patchify_proj.": "LTX-Video",
    "head.modulation": "Wan",
    "clip_txt_mapper.": "Stable Cascade",
    "edm_mean": "Playground 2.5",
}
"""Models that are not supported, by a part of a key that only their single files have."""


def recognize_weights(keys: Collection[str], given: str, otherwise: Family = STABLE_DIFFUSION) -> Family:
    """The family of a single file in the original layout, by the names of its weights.

    Args:
        keys: names of the weights.
        given: what named the file.
        otherwise: for a part alone that every family has, such as an autoencoder.

    Raises:
        SettingsError: if it is of another model.
    """
    own = [family for family in FAMILIES if any(key.startswith(family.original_marks) for key in keys)]
    found = next((model for mark, model in OTHER_MODELS.items() if any(mark in key for key in keys)), None)
    titles = " and ".join(family.title for family in FAMILIES if not family.refines)
    if len(own) > 1 and not found:
        found = f"another model, whose keys are partly those of {titles}"
    if found:
        raise SettingsError(f"{given}: is a checkpoint of {found}; only {titles} are supported; give one of these.")
    return own[0] if own else otherwise


def check_same_family(found: Family, wanted: Family, given: str, part: str) -> None:
    """Check that a file is of the family of the checkpoint that it gives a part to.

    Raises:
        SettingsError: if it is of another.
    """
    if found is not wanted:
        raise SettingsError(f"{given}: is of {found.title}; give a {part} of {wanted.title}, as the checkpoint is.")


def recognize_family(index: Mapping[str, Any], setting: str) -> Family:
    """The family of a checkpoint.

    Args:
        index: what its ``model_index.json`` says; one that names no class is taken for Stable Diffusion 1.x or 2.x.
        setting: what named the checkpoint, such as ``pretrained=tiny``.

    Raises:
        SettingsError: if its pipeline is of none.
    """
    name = index.get("_class_name")
    if not isinstance(name, str):
        return STABLE_DIFFUSION
    for family in FAMILIES:
        if family.recognizes(index):
            return family
    bases = [family for family in FAMILIES if not family.refines]
    supported = " and ".join(f"{family.title} ({family.pipelines_in_words})" for family in bases)
    raise SettingsError(f"{setting}: is a checkpoint of {name}; only {supported} are supported; give one of these.")
