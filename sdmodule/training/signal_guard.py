"""Ending processes after a signal: all devices together, and each even if it waits for one that is gone."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Container

import torch
from lightning import Trainer

from sdmodule.training.slurm import REQUEUE_SIGNAL, requeue

ASKING_INTERVAL = 2.0
"""Seconds between two questions of `SignalPoll`, about."""

PATIENCE = 25.0
"""Seconds after a signal until a process that waits for others ends by itself; clusters kill after 30."""


class SignalGuard:
    """Ends the process some seconds after a signal, unless it is released before.

    Python's own handlers do not run while the main thread waits in a collective operation; this is a thread that hears
    of signals through a pipe.

    Args:
        numbers: the signals; after `REQUEUE_SIGNAL`, SLURM is asked to queue the job again.
    """

    def __init__(self, numbers: Container[int] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self._numbers = numbers
        self._released = threading.Event()
        self._heard, self._told = socket.socketpair()
        self._told.setblocking(False)
        self._before = signal.set_wakeup_fd(self._told.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._wait, daemon=True).start()

    def release(self) -> None:
        """From here on the process ends in its own time."""
        if not self._released.is_set():
            self._released.set()
            signal.set_wakeup_fd(self._before)
            self._told.close()

    def _wait(self) -> None:
        number = 0
        while number not in self._numbers:
            heard = self._heard.recv(1)
            if not heard:  # released
                return
            number = heard[0]
        if not self._released.wait(PATIENCE):
            words = f"not ended {PATIENCE:g} seconds after the signal, as if a device were gone; ending now"
            print(words, file=sys.stderr, flush=True)
            if number == REQUEUE_SIGNAL:
                requeue()
            os._exit(128 + number)


class SignalPoll:
    """Asks all devices of a training whether one of them has had a signal, so that they stop at the same step.

    To ask, a GPU must finish what it has been given. So they are asked every few seconds, after a number of steps that
    follows from the pace of the slowest; devices of a CPU are asked after every step.
    """

    def __init__(self) -> None:
        self._next_step = 0
        self._asked: tuple[float, int] | None = None  # time and step of the last question

    def due(self, trainer: Trainer) -> bool:
        """Whether to ask after this step; the same on all devices."""
        return trainer.strategy.root_device.type == "cpu" or trainer.global_step >= self._next_step

    def ask(self, trainer: Trainer, signalled: bool) -> bool:
        """Whether any device has had a signal; all of them must ask."""
        if trainer.world_size == 1 or trainer.strategy.root_device.type == "cpu":
            return trainer.strategy.reduce_boolean_decision(signalled, all=False)
        now, step, pace = time.perf_counter(), trainer.global_step, 0.0
        if self._asked is not None and step > self._asked[1]:
            pace = (now - self._asked[0]) / (step - self._asked[1])
        votes = torch.tensor([float(signalled), pace], device=trainer.strategy.root_device)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
        found, slowest = votes.tolist()
        self._asked = (time.perf_counter(), step)
        self._next_step = step + (max(1, int(ASKING_INTERVAL / slowest)) if slowest else 1)
        return bool(found)
