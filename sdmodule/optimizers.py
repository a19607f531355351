"""Optimizers in their fastest form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from sdmodule.errors import SettingsError

FUSABLE = (torch.optim.Adam, torch.optim.AdamW)
"""Those of torch that update all weights in one pass where ``fused`` says so."""


def check_optimizer(
    make: Callable[..., torch.optim.Optimizer], schedule: Callable[..., Any] | None, parameters: Iterable[Any]
) -> None:
    """Try an optimizer's settings, and its schedule's, on what is trained, long before the first step.

    Args:
        make: takes parameters and returns the optimizer.
        schedule: takes the optimizer and returns the schedule of its learning rate.
        parameters: what is trained, or groups of it; it is left as it is.

    Raises:
        SettingsError: if one of them does not take them.
    """
    name = "model.optimizer"
    try:
        optimizer = make(parameters)
        if schedule is not None:
            name = "model.lr_scheduler"
            schedule(optimizer)
    except (TypeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(
            f"{name}: these settings cannot be used: {reason}; give those that its _target_ takes."
        ) from error


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
