"""Build a scheduler of diffusers from a short name, a class name or settings."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin

from sdmodule.errors import SettingsError, choices

SHORT_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
"""Short names, each with the class and the settings that it stands for."""

KNOWN = {member.name for member in KarrasDiffusionSchedulers} & set(dir(diffusers))
"""Scheduler classes of diffusers that work with Stable Diffusion's noise schedule."""

CLASSES = sorted(name for name in KNOWN if issubclass(getattr(diffusers, name), SchedulerMixin))
"""The available ones: diffusers puts an empty class where an optional dependency is missing."""


def resolve_scheduler(wanted: str | Mapping[str, Any] | None, base: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Class name of the scheduler that `make_scheduler` builds, and the settings that override the checkpoint's.

    ``make_scheduler({"name": class_name, **settings}, base)`` builds the same scheduler.

    Args:
        wanted: see `make_scheduler`.
        base: see `make_scheduler`.

    Raises:
        SettingsError: for an unknown name, or one that needs a package that is not installed.
    """
    settings = dict(wanted) if isinstance(wanted, Mapping) else {"name": wanted}
    name = settings.pop("name", None) or base.get("_class_name", "DDIMScheduler")
    class_name, preset = SHORT_NAMES.get(name, (name, {}))
    if class_name in KNOWN and class_name not in CLASSES:
        missing = [package for package in getattr(diffusers, class_name)._backends if find_spec(package) is None]
        raise SettingsError(
            f"scheduler={name}: needs {choices(missing)}, which is not installed; install it, or choose one of "
            f"{choices(SHORT_NAMES)}."
        )
    if class_name not in CLASSES:
        raise SettingsError(
            f"scheduler={name}: unknown; choose one of {choices(SHORT_NAMES)}, or a class: {choices(CLASSES)}."
        )
    return class_name, {**preset, **settings}


def make_scheduler(wanted: str | Mapping[str, Any] | None, base: Mapping[str, Any]) -> SchedulerMixin:
    """Build a scheduler on the noise schedule of a checkpoint.

    Args:
        wanted: a short name, or the name of a diffusers class; or ``{"name": …}`` with settings that override the
            checkpoint's; or None for the checkpoint's own scheduler.
        base: configuration of the checkpoint's scheduler (betas, prediction type and the rest).

    Raises:
        SettingsError: for an unknown name or setting.
    """
    class_name, settings = resolve_scheduler(wanted, base)
    scheduler_class = getattr(diffusers, class_name)
    allowed = set(scheduler_class._get_init_keys(scheduler_class))
    unknown = set(settings) - allowed
    if unknown:
        name = (wanted.get("name") if isinstance(wanted, Mapping) else wanted) or class_name
        raise SettingsError(
            f"scheduler={name}: unknown settings {choices(unknown)}; its settings are {choices(allowed - {'self'})}."
        )
    # a copy of this scheduler is built from the class named in its configuration
    return scheduler_class.from_config({**base, "_class_name": class_name}, **settings)
