"""A checkpoint with everything that is loaded beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sdmodule.components.adapters import AdapterSettings, use_adapters
from sdmodule.components.base_model import BaseModel
from sdmodule.components.checkpoint import Components, family_of, load_components
from sdmodule.components.controlnet import load_controlnets
from sdmodule.components.ip_adapter import load_ip_adapter
from sdmodule.components.refiner import load_refiner
from sdmodule.errors import SettingsError
from sdmodule.io.redact import shorten_home

BESIDE = ("controlnet", "refiner", "ip_adapter", "image_encoder")
"""Models that sample beside the checkpoint and are not part of it."""


def place_names(components: Mapping[str, Any] | None) -> dict[str, Any]:
    """Where parts come from, by their names, with ``~`` for the home folder; a place that is None is left out.

    Several ControlNets are a list of places.

    Raises:
        SettingsError: for a place that is no path or name.
    """
    places: dict[str, Any] = {}
    for name, place in (components or {}).items():
        if not place:
            continue
        key = name if name in BESIDE[:3] else f"components.{name}"
        if name == "controlnet" and isinstance(place, (list, tuple)) and all(isinstance(p, (str, Path)) for p in place):
            places[name] = [shorten_home(str(one)) for one in place]
            continue
        if not isinstance(place, (str, Path)):
            raise SettingsError(f"{key}={place}: must be one path or hub id.")
        places[name] = shorten_home(str(place))
    return places


def load_model(
    pretrained: str,
    revision: str | None,
    variant: str | None,
    components: Mapping[str, Any],
    scratch: Iterable[str],
    adapters: AdapterSettings,
) -> tuple[Components, BaseModel]:
    """A model ready to sample with, and the identity of the checkpoint it is made of.

    Args:
        pretrained: the checkpoint; see `load_components`.
        revision: branch, tag or commit of a hub id.
        variant: which weights of a folder or hub id.
        components: another place for a part, by its name; ``controlnet`` names a ControlNet, or several;
            ``refiner`` names a refiner, ``ip_adapter`` an IP-Adapter and ``image_encoder`` what it sees with.
        scratch: parts that start from random weights.
        adapters: what is put on the model.

    Raises:
        SettingsError: when anything cannot be read or does not fit.
    """
    places = {name: place for name, place in components.items() if name not in BESIDE}
    if family_of(pretrained, revision).refines:
        raise SettingsError(
            f"pretrained={pretrained}: is a refiner, which samples only after another model; give "
            f"refiner={pretrained}, and as pretrained a base model such as stabilityai/stable-diffusion-xl-base-1.0."
        )
    parts = load_components(pretrained, revision=revision, variant=variant, components=places, scratch=scratch)
    base_model = BaseModel(parts, scratch)
    use_adapters(parts, adapters.files, adapters.merge)
    if "controlnet" in components:
        parts.controlnet = load_controlnets(components["controlnet"], parts)
    if "ip_adapter" in components:
        load_ip_adapter(components["ip_adapter"], components.get("image_encoder"), parts)
    elif "image_encoder" in components:
        raise SettingsError(
            "components.image_encoder: is that of an IP-Adapter; give ip_adapter=FILE, or leave it out."
        )
    if "refiner" in components:
        parts.refiner = load_refiner(components["refiner"], parts)
    parts.origin = {
        name: value
        for name, value in {
            "revision": revision,
            "variant": variant,
            "components": places,
            **{name: components.get(name) for name in BESIDE},
            **adapters.metadata(),
        }.items()
        if value
    }
    return parts, base_model
