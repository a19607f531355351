"""How many processes load data, and into which memory."""

from __future__ import annotations

import os
from typing import Any

from lightning import Trainer

from sdmodule.errors import check_int

MOST = 8
"""Loading processes for each device at most, unless more are asked for."""


def check_workers(workers: Any) -> None:
    """Check ``data.num_workers``.

    Raises:
        SettingsError: unless it is None or a whole number of at least 0.
    """
    if workers is not None:
        check_int("data.num_workers", workers, minimum=0)


def loading_options(workers: int | None, trainer: Trainer | None, batches: int | None = None) -> dict[str, Any]:
    """Arguments of a ``DataLoader`` for the device that is trained on.

    A GPU gets batches in pinned memory, which are copied up while it computes, and by default as many processes as
    there are cores for each device but one: the training's own. A CPU trains on all of its cores, and by default in one
    process. Batches are the same either way.

    Args:
        workers: what was asked for; None for the default.
        trainer: names the device; None is a CPU.
        batches: of the loader, as more processes would idle; None if that is not known.
    """
    if trainer is None or trainer.strategy.root_device.type != "cuda":
        return {"num_workers": workers or 0, "pin_memory": False}
    if workers is None:
        workers = min(default_workers(trainer.num_devices), batches or MOST)
    return {"num_workers": workers, "pin_memory": True}


def default_workers(devices: int = 1) -> int:
    """Loading processes for each of the devices of a machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST, cores // devices - 1))
