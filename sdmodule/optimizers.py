"""Optimizers in their fastest form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning import Trainer
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from sdmodule.errors import SettingsError

FUSABLE = (torch.optim.Adam, torch.optim.AdamW)
"""Those of torch that update all weights in one pass where ``fused`` says so."""


def check_optimizer(
    make: Callable[..., torch.optim.Optimizer],
    schedule: Callable[..., Any] | None,
    parameters: Iterable[Any],
    steps: int | None = None,
) -> None:
    """Try an optimizer's settings, and its schedule's, on what is trained, long before the first step.

    Args:
        make: takes parameters and returns the optimizer.
        schedule: takes the optimizer and returns the schedule of its learning rate.
        parameters: what is trained, or groups of it; it is left as it is.
        steps: of the training, where that is known.

    Raises:
        SettingsError: if one of them does not take them, and for a schedule that cannot be stepped at every step.
    """
    name = "model.optimizer"
    scheduler = None
    try:
        optimizer = make(parameters)
        if schedule is not None:
            name = "model.lr_scheduler"
            scheduler = schedule(optimizer)
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"{name}: these settings cannot be used: {reason}; give those that its _target_ takes."
        ) from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise SettingsError(
            "model.lr_scheduler: ReduceLROnPlateau follows a figure and is not stepped every step; give another "
            "schedule, such as torch.optim.lr_scheduler.CosineAnnealingLR."
        )
    if steps is not None and isinstance(scheduler, OneCycleLR) and scheduler.total_steps < steps:
        raise SettingsError(
            f"model.lr_scheduler: OneCycleLR ends after {scheduler.total_steps} steps and trainer.max_steps={steps}; "
            f"give it total_steps={steps}, or fewer trainer.max_steps."
        )


NAMES = "optimizer_names"
"""Where a checkpoint has the classes of its optimizers."""


def name_optimizers(checkpoint: dict[str, Any], trainer: Trainer | None) -> None:
    """Note in a checkpoint of which classes the optimizers are whose states it holds."""
    if trainer is not None:
        checkpoint[NAMES] = [type(optimizer).__name__ for optimizer in trainer.optimizers]


def check_state(
    held: Mapping[str, Any],
    make: Callable[..., torch.optim.Optimizer],
    schedule: Callable[..., Any] | None,
    parameters: Iterable[Any],
    trainer: Trainer | None,
) -> None:
    """Check, before they are used, that a checkpoint's optimizer and schedule are such as those of a training.

    Args:
        held: the checkpoint.
        make: takes parameters and returns the optimizer.
        schedule: takes the optimizer and returns the schedule of its learning rate.
        parameters: what is trained, or groups of it; it is left as it is.
        trainer: what goes on from the checkpoint; if it is for no training, nothing is checked.

    Raises:
        SettingsError: if not.
    """
    if trainer is None or not trainer.training:
        return
    if trainer.strategy.restore_checkpoint_after_setup or not held.get("optimizer_states"):  # these are cut up
        return
    optimizer, groups = make(parameters), held["optimizer_states"][0].get("param_groups", [])
    name = type(optimizer).__name__
    known = held.get(NAMES, [name])  # in checkpoints of before there is none
    sizes, found = ([len(group["params"]) for group in some] for some in (optimizer.param_groups, groups))
    # switches are left out, of which releases of torch add some
    defaults = getattr(optimizer, "defaults", {})
    settings = {setting for setting, value in defaults.items() if not isinstance(value, bool | None)}
    if sizes != found or known != [name] or not all(settings <= group.keys() for group in groups):
        raise SettingsError(
            f"the checkpoint's optimizer is not {name} of {' + '.join(map(str, sizes))} weights, which it is here; "
            "give the model.optimizer and tuning that it was trained with."
        )
    steps = trainer.max_steps
    if schedule is None or not isinstance(schedule(optimizer), OneCycleLR):
        return
    for ends in (one["total_steps"] for one in held.get("lr_schedulers", []) if one.get("total_steps", steps) < steps):
        raise SettingsError(
            f"the checkpoint's OneCycleLR ends after {ends} steps and trainer.max_steps={steps}; give "
            f"trainer.max_steps={ends}, or another model.lr_scheduler."
        )


def build_optimizer(
    make: Callable[..., torch.optim.Optimizer], parameters: Iterable[nn.Parameter], precision: str
) -> torch.optim.Optimizer:
    """Build an optimizer, fused where nothing else was said of how it updates.

    Args:
        make: takes parameters; a class, or a ``partial`` of one.
        parameters: what is trained.
        precision: the trainer's. A fused optimizer scales the gradients of ``16-mixed`` back itself, and then Lightning
            cannot clip them: with that it is an ordinary one.
    """
    kind, given = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    options: dict[str, Any] = {}
    if kind in FUSABLE and not given.keys() & {"fused", "foreach"} and precision != "16-mixed":
        options["fused"] = True
    return make(parameters, **options)


def parameter_groups(module: nn.Module, text_encoder: nn.Module, text_encoder_lr: float | None) -> list[Any]:
    """What is trained of a module, for its optimizer; the text encoder apart where it has its own learning rate."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    if text_encoder_lr is None:
        return trained
    apart = {id(weight) for weight in text_encoder.parameters()}
    return [
        {"params": [weight for weight in trained if id(weight) not in apart]},
        {"params": [weight for weight in trained if id(weight) in apart], "lr": text_encoder_lr},
    ]
