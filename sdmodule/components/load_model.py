"""A checkpoint with everything that is loaded beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdmodule.components.adapters import AdapterSettings, use_adapters
from sdmodule.components.base_model import BaseModel
from sdmodule.components.checkpoint import Components, family_of, load_components
from sdmodule.components.controlnet import load_controlnet
from sdmodule.errors import SettingsError
from sdmodule.families.family import CONTROLNET
from sdmodule.io.redact import shorten_home


def place_names(components: Mapping[str, Any] | None) -> dict[str, str]:
    """Where parts come from, by their names, with ``~`` for the home folder; a place that is None is left out.

    Raises:
        SettingsError: for a place that is no path or name.
    """
    places = {}
    for name, place in (components or {}).items():
        if not place:
            continue
        key = name if name == "controlnet" else f"components.{name}"
        if not isinstance(place, (str, Path)):
            raise SettingsError(f"{key}={place}: must be one path or hub id.")
        places[name] = shorten_home(str(place))
    return places


def load_model(
    pretrained: str,
    revision: str | None,
    variant: str | None,
    components: Mapping[str, str],
    scratch: Iterable[str],
    adapters: AdapterSettings,
) -> tuple[Components, BaseModel]:
    """A model ready to sample with, and the identity of the checkpoint it is made of.

    Args:
        pretrained: the checkpoint; see `load_components`.
        revision: branch, tag or commit of a hub id.
        variant: which weights of a folder or hub id.
        components: another place for a part, by its name; ``controlnet`` names a ControlNet.
        scratch: parts that start from random weights.
        adapters: what is put on the model.

    Raises:
        SettingsError: when anything cannot be read or does not fit.
    """
    places = {name: place for name, place in components.items() if name != "controlnet"}
    family = family_of(pretrained, revision)
    if "controlnet" in components:
        family.check_supports(CONTROLNET, f"controlnet={components['controlnet']}", pretrained)
    parts = load_components(pretrained, revision=revision, variant=variant, components=places, scratch=scratch)
    base_model = BaseModel(parts, scratch)
    use_adapters(parts, adapters.files, adapters.merge)
    if "controlnet" in components:
        parts.controlnet = load_controlnet(components["controlnet"], parts)
    parts.origin = {
        name: value
        for name, value in {
            "revision": revision,
            "variant": variant,
            "components": places,
            "controlnet": components.get("controlnet"),
            **adapters.metadata(),
        }.items()
        if value
    }
    return parts, base_model
