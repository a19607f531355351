"""Which way of tuning is meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from typing import Any

from sdmodule.errors import SettingsError, choices
from sdmodule.training.controlnet import ControlNetTuning
from sdmodule.training.full import FullTuning
from sdmodule.training.lora import LoraTuning
from sdmodule.training.textual_inversion import TextualInversion

KINDS = {tuning.kind: tuning for tuning in (ControlNetTuning, FullTuning, LoraTuning, TextualInversion)}

Tuning = ControlNetTuning | FullTuning | LoraTuning | TextualInversion
"""What is trained of a model: it prepares the model's parts, and writes what was trained."""


def choose_tuning(settings: Mapping[str, Any] | None) -> Tuning:
    """The way of tuning of a mapping with its ``kind`` and its own settings; ``full`` if None.

    Raises:
        SettingsError: for an unknown kind, a setting that it does not have, or a value out of range.
    """
    own = dict(settings or {})
    kind = own.pop("kind", FullTuning.kind)
    if kind not in KINDS:
        raise SettingsError(f"tuning={kind} is not known; give one of {choices(KINDS)}.")
    known = KINDS[kind].__dataclass_fields__
    if unknown := own.keys() - known.keys():
        raise SettingsError(
            f"tuning.{choices(unknown)} is no setting of tuning={kind}; its settings are {choices(known)}."
        )
    missing = [name for name, field in known.items() if field.default is MISSING and name not in own]
    if missing:
        raise SettingsError(f"tuning={kind} needs tuning.{missing[0]}; give it.")
    return KINDS[kind](**own)


def check_scratch(tuning: Tuning, scratch: Iterable[str]) -> None:
    """Check that what starts from random weights is trained.

    Raises:
        SettingsError: if not.
    """
    if untrained := set(scratch) - tuning.from_scratch:
        raise SettingsError(
            f"scratch={choices(untrained)} would stay random: tuning={tuning.kind} does not train all of it; "
            "leave it out, or set tuning=full, with tuning.text_encoder=true for the text encoder."
        )
