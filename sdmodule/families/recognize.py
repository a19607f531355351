"""Which family a checkpoint is of, by what its index says, before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdmodule.errors import SettingsError
from sdmodule.families.family import Family
from sdmodule.families.stable_diffusion import StableDiffusion
from sdmodule.families.stable_diffusion_xl import StableDiffusionXL
from sdmodule.families.stable_diffusion_xl_refiner import StableDiffusionXLRefiner

STABLE_DIFFUSION = StableDiffusion()
FAMILIES: tuple[Family, ...] = (STABLE_DIFFUSION, StableDiffusionXL(), StableDiffusionXLRefiner())


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
