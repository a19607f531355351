"""Optimizers in their fastest form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau

from sdmodule.errors import SettingsError
from sdmodule.ranges import is_number

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
        trainer: what goes on from the checkpoint, or is about to; if it is for no training, nothing is checked.

    Raises:
        SettingsError: if not.
    """
    if trainer is None or trainer.state.fn not in (None, TrainerFn.FITTING):
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
    steps, schedules = trainer.max_steps, held.get("lr_schedulers", [])
    scheduler = None if schedule is None else schedule(optimizer)
    if bool(schedules) != (scheduler is not None):
        raise SettingsError(
            "the checkpoint was trained with a model.lr_scheduler, and none is given; give the one of that training."
            if schedules
            else "the checkpoint was trained without a model.lr_scheduler, and one is given; leave it out."
        )
    for ends in (one["total_steps"] for one in schedules if one.get("total_steps", steps) < steps):
        if isinstance(scheduler, OneCycleLR):
            raise SettingsError(
                f"the checkpoint's OneCycleLR ends after {ends} steps and trainer.max_steps={steps}; give "
                f"trainer.max_steps={ends}, or another model.lr_scheduler."
            )
    _check_given(make, optimizer.param_groups, groups)
    if scheduler is not None:
        _check_same("model.lr_scheduler.", _keywords(schedule), scheduler.state_dict(), schedules[0])


def _keywords(make: Any) -> set[str]:
    """The settings that were given of what is to be made."""
    return set(make.keywords) if isinstance(make, partial) else set()


def _check_given(make: Any, groups: Iterable[dict[str, Any]], held: Iterable[dict[str, Any]]) -> None:
    """Check what was given of an optimizer; what a schedule changes is left out, but for the rate at the start."""
    given = _keywords(make)
    for number, (ours, theirs) in enumerate(zip(groups, held, strict=True)):
        own, other = ({"lr": group.get("initial_lr", group.get("lr"))} for group in (ours, theirs))
        if number or "lr" in given:
            _check_same("tuning.text_encoder_" if number else "model.optimizer.", {"lr"}, own, other)
        changed = {"lr", "momentum"} if "initial_lr" in ours else {"lr"}
        _check_same("model.optimizer.", given - changed, ours, theirs)


def _check_same(key: str, names: Iterable[str], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Check that a checkpoint, which a training goes on with, has the numbers that were given.

    Raises:
        SettingsError: if not.
    """
    for name in sorted(names):
        own, other = ours.get(name), theirs.get(name)
        if is_number(own) and is_number(other) and own != other:
            raise SettingsError(
                f"{key}{name}={own} was given, and the checkpoint goes on with {other}; give {other}, or begin a "
                "training of its own without ckpt_path."
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
