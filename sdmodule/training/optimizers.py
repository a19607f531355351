"""Optimizers and learning rate schedules: built, checked before the first step, compared with a checkpoint's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, PolynomialLR, ReduceLROnPlateau

from sdmodule.errors import SettingsError, is_number

FUSABLE = (torch.optim.Adam, torch.optim.AdamW)
"""Optimizers of torch that update all weights in one pass if ``fused``."""

OPTIMIZER_NAMES = "optimizer_names"
"""Where a checkpoint holds the class names of its optimizers."""


@dataclass(frozen=True)
class Optimization:
    """How trainable weights are updated.

    Args:
        optimizer: takes parameters and returns the optimizer; a class, or a ``partial`` of one; None for AdamW as
            ``conf/model`` sets it, at the usual rate.
        lr_scheduler: takes the optimizer and returns its learning rate schedule, stepped every step; None for a
            constant learning rate.
        usual: settings of AdamW if no optimizer is given; torch's own learning rate is 1e-3.
    """

    optimizer: Callable[..., torch.optim.Optimizer] | None
    lr_scheduler: Callable[..., Any] | None = None
    usual: Mapping[str, float] = field(default_factory=lambda: {"lr": 1e-5})

    @property
    def make(self) -> Callable[..., torch.optim.Optimizer]:
        """Takes parameters and returns the optimizer."""
        if self.optimizer is not None:
            return self.optimizer
        settings: dict[str, Any] = {"betas": (0.9, 0.999), "weight_decay": 0.01, **self.usual}
        return partial(torch.optim.AdamW, **settings)

    def configure(self, parameters: Iterable[Any], fused: bool = True) -> Any:
        """What ``configure_optimizers`` returns.

        Args:
            parameters: what is trained, or groups of it.
            fused: whether the optimizer may be fused.
        """
        optimizer = build_optimizer(self.make, parameters, fused)
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}

    def check(self, parameters: Iterable[Any], max_steps: int | None = None) -> None:
        """Try the settings on what is trained, long before the first step; nothing is changed.

        Args:
            parameters: what is trained, or groups of it.
            max_steps: of the training, if known.

        Raises:
            SettingsError: if they cannot be used, and for a schedule that cannot be stepped every step.
        """
        name = "model.optimizer"
        scheduler = None
        try:
            optimizer = self.make(parameters)
            if self.lr_scheduler is not None:
                name = "model.lr_scheduler"
                scheduler = self.lr_scheduler(optimizer)
        except (TypeError, ValueError, AssertionError) as error:
            reason = " ".join(str(error).split())
            raise SettingsError(
                f"{name}: these settings cannot be used: {reason}; give those that its _target_ takes."
            ) from error
        if isinstance(scheduler, ReduceLROnPlateau):
            raise SettingsError(
                "model.lr_scheduler: ReduceLROnPlateau follows a metric and cannot be stepped every step; give another "
                "schedule, such as torch.optim.lr_scheduler.CosineAnnealingLR."
            )
        _warn_of_early_end(scheduler, max_steps or 0)
        if max_steps is not None and isinstance(scheduler, OneCycleLR) and scheduler.total_steps < max_steps:
            raise SettingsError(
                f"model.lr_scheduler: OneCycleLR ends after {scheduler.total_steps} of trainer.max_steps={max_steps} "
                f"steps; set its total_steps={max_steps}, or give fewer trainer.max_steps."
            )

    def check_state(self, checkpoint: Mapping[str, Any], parameters: Iterable[Any], trainer: Trainer | None) -> None:
        """Check, before it is used, that a checkpoint's optimizer and schedule match those of this training.

        Args:
            checkpoint: as loaded.
            parameters: what is trained, or groups of it; left as it is.
            trainer: what resumes from the checkpoint; unless it trains, nothing is checked.

        Raises:
            SettingsError: if they do not.
        """
        if trainer is None or trainer.state.fn not in (None, TrainerFn.FITTING):
            return
        if not checkpoint.get("optimizer_states"):
            return
        optimizer = self.make(parameters)
        groups = checkpoint["optimizer_states"][0].get("param_groups", [])
        _check_kind(optimizer, groups, checkpoint)
        schedules = checkpoint.get("lr_schedulers", [])
        scheduler = None if self.lr_scheduler is None else self.lr_scheduler(optimizer)
        if bool(schedules) != (scheduler is not None):
            raise SettingsError(
                "model.lr_scheduler: the checkpoint was trained with one, and none is given; give that training's."
                if schedules
                else "model.lr_scheduler: the checkpoint was trained without one; leave it out."
            )
        steps = trainer.max_steps
        for ends in (one["total_steps"] for one in schedules if one.get("total_steps", steps) < steps):
            if isinstance(scheduler, OneCycleLR):
                raise SettingsError(
                    f"trainer.max_steps={steps}: the checkpoint's OneCycleLR ends after {ends} steps; give "
                    f"trainer.max_steps={ends}, or another model.lr_scheduler."
                )
        _check_given(self.optimizer, optimizer.param_groups, groups)
        if scheduler is not None:
            _check_same("model.lr_scheduler.", _keywords(self.lr_scheduler), scheduler.state_dict(), schedules[0])


def _warn_of_early_end(scheduler: Any, max_steps: int) -> None:
    """Say it if a schedule ends before the training does."""
    name = type(scheduler).__name__
    if isinstance(scheduler, CosineAnnealingLR) and 0 < scheduler.T_max < max_steps:
        rank_zero_warn(
            f"model.lr_scheduler: {name} reaches its minimum after {scheduler.T_max} of {max_steps} steps and rises "
            f"again; set its T_max={max_steps}."
        )
    elif isinstance(scheduler, PolynomialLR) and 0 < scheduler.total_iters < max_steps:
        rank_zero_warn(
            f"model.lr_scheduler: {name} ends after {scheduler.total_iters} of {max_steps} steps, and nothing is "
            f"learned in the others; set its total_iters={max_steps}."
        )


def name_optimizers(checkpoint: dict[str, Any], trainer: Trainer | None) -> None:
    """Note in a checkpoint the classes of the optimizers whose states it holds."""
    if trainer is not None:
        checkpoint[OPTIMIZER_NAMES] = [type(optimizer).__name__ for optimizer in trainer.optimizers]


def build_optimizer(
    make: Callable[..., torch.optim.Optimizer], parameters: Iterable[nn.Parameter], fused: bool = True
) -> torch.optim.Optimizer:
    """Build an optimizer, fused unless its settings say otherwise.

    Args:
        make: takes parameters; a class, or a ``partial`` of one.
        parameters: what is trained.
        fused: whether it may be fused: Lightning's own ``16-mixed`` cannot clip the gradients of a fused optimizer.
    """
    kind, given = (make.func, make.keywords) if isinstance(make, partial) else (make, {})
    options: dict[str, Any] = {}
    if fused and kind in FUSABLE and not given.keys() & {"fused", "foreach"}:
        options["fused"] = True
    return make(parameters, **options)


def parameter_groups(module: nn.Module, text_encoders: Iterable[nn.Module], text_encoder_lr: float | None) -> list[Any]:
    """The trainable weights of a module, those of text encoders in a group of their own if they have their own rate."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    if text_encoder_lr is None:
        return trained
    own = {id(weight) for encoder in text_encoders for weight in encoder.parameters()}
    return [
        {"params": [weight for weight in trained if id(weight) not in own]},
        {"params": [weight for weight in trained if id(weight) in own], "lr": text_encoder_lr},
    ]


def _check_kind(optimizer: torch.optim.Optimizer, groups: Any, checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint's optimizer is of the same class, and of as many weights in each group."""
    name = type(optimizer).__name__
    names = checkpoint.get(OPTIMIZER_NAMES, [name])
    sizes, found = ([len(group["params"]) for group in some] for some in (optimizer.param_groups, groups))
    # flags are left out: new versions of torch add some
    defaults = getattr(optimizer, "defaults", {})
    settings = {setting for setting, value in defaults.items() if not isinstance(value, bool | None)}
    if sizes != found or names != [name] or not all(settings <= group.keys() for group in groups):
        raise SettingsError(
            f"the checkpoint's optimizer is not {name} with {' + '.join(map(str, sizes))} weights, as it is here; "
            "give the model.optimizer and tuning that it was trained with."
        )


def _keywords(make: Any) -> set[str]:
    """The settings that were given explicitly."""
    return set(make.keywords) if isinstance(make, partial) else set()


def _check_given(make: Any, groups: Iterable[dict[str, Any]], held: Iterable[dict[str, Any]]) -> None:
    """Compare the optimizer settings that were given; what a schedule changes is skipped, but for the first rate."""
    given = _keywords(make)
    for number, (ours, theirs) in enumerate(zip(groups, held, strict=True)):
        own, other = ({"lr": group.get("initial_lr", group.get("lr"))} for group in (ours, theirs))
        if number or "lr" in given:
            _check_same("tuning.text_encoder_" if number else "model.optimizer.", {"lr"}, own, other)
        changed = {"lr", "momentum"} if "initial_lr" in ours else {"lr"}
        _check_same("model.optimizer.", given - changed, ours, theirs)


def _check_same(key: str, names: Iterable[str], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Check that a checkpoint, whose values a resumed training keeps, has the numbers that were given."""
    for name in sorted(names):
        own, other = ours.get(name), theirs.get(name)
        if is_number(own) and is_number(other) and own != other:
            raise SettingsError(
                f"{key}{name}={own}: the checkpoint has {other}, and a resumed training keeps it; give {other}, or "
                "start a new training without ckpt_path."
            )
