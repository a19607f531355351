"""The tuning methods, and choosing one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from lightning import Trainer

from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError, check_choice, choices
from sdmodule.training.controlnet import ControlNetTuning
from sdmodule.training.full import FullTuning
from sdmodule.training.lora import LoraTuning
from sdmodule.training.strategies import check_strategy
from sdmodule.training.textual_inversion import TextualInversion

KINDS = {tuning.kind: tuning for tuning in (ControlNetTuning, FullTuning, LoraTuning, TextualInversion)}

Tuning = ControlNetTuning | FullTuning | LoraTuning | TextualInversion
"""A tuning method: it prepares the model's parts for training, and exports what was trained."""


def choose_tuning(settings: Mapping[str, Any] | None) -> Tuning:
    """The tuning method that a mapping names as its ``kind``, with the mapping's other settings; ``full`` if None.

    Raises:
        SettingsError: for an unknown kind, an unknown or missing setting, or a value out of range.
    """
    if settings is not None and not isinstance(settings, Mapping):
        raise SettingsError(f"tuning={settings!r}: must be settings such as tuning={{'kind': 'lora'}}.")
    own = dict(settings or {})
    kind = own.pop("kind", FullTuning.kind)
    check_choice("tuning", kind, KINDS)
    known = {field.name: field for field in fields(KINDS[kind])}
    if unknown := own.keys() - known.keys():
        raise SettingsError(f"tuning.{choices(unknown)}: unknown; tuning={kind} has {choices(known)}.")
    missing = [name for name, field in known.items() if field.default is MISSING and name not in own]
    if missing:
        raise SettingsError(f"tuning={kind}: needs tuning.{missing[0]}; give it.")
    return KINDS[kind](**own)


def check_layout(trained: Any, layout: str, key: str = "layout") -> None:
    """Check that what was trained can be exported in a layout.

    Args:
        trained: a tuning, or a module that has no choice of them; its ``layouts`` are allowed.
        layout: what was given.
        key: the setting that gave it.

    Raises:
        SettingsError: if it cannot.
    """
    if layout not in trained.layouts:
        what = f"tuning={trained.kind}" if hasattr(trained, "kind") else "this model"
        raise SettingsError(f"{key}={layout}: {what} is exported as {choices(trained.layouts)}; choose one of these.")


def export(tuning: Tuning, parts: Components, folder: str | Path, dtype: str, layout: str) -> None:
    """Write what a tuning has trained to a folder, its weights as ``dtype``.

    Raises:
        SettingsError: for a layout that the tuning does not have.
    """
    check_layout(tuning, layout)
    tuning.export(parts, folder, dtype, layout)


def check_scratch(tuning: Tuning, scratch: Iterable[str]) -> None:
    """Check that every part that starts from random weights is trained.

    Raises:
        SettingsError: if one is not.
    """
    if untrained := set(scratch) - tuning.from_scratch:
        raise SettingsError(
            f"scratch={choices(untrained)}: would stay random, since tuning={tuning.kind} does not train all of it; "
            "leave it out, or use tuning=full, with tuning.text_encoder=true for the text encoder."
        )


def check_stage(parts: Components, stage: str, task: str, trainer: Trainer | None) -> None:
    """Check that a model can be used in a stage of Lightning's: it may be for sampling alone.

    Args:
        parts: the model.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.
        task: of the model.
        trainer: the trainer.

    Raises:
        SettingsError: if it cannot.
    """
    check_strategy(trainer, shards=stage in ("fit", "validate"))
    if stage != "predict" and task == "image2image":
        raise SettingsError("model=image2image: is for sampling; train with model=text2image.")
    if stage == "fit" and parts.origin.keys() & {"adapters", "controlnet", "refiner", "ip_adapter"}:
        raise SettingsError(
            "adapters, controlnet, refiner and ip_adapter: are for sampling; train on the checkpoint alone."
        )
