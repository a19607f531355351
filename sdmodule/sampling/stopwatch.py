"""Timing of the stages and steps of sampling."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch


class Stopwatch:
    """Seconds per stage and per denoising step; waits for the device only at the end of each stage."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.marks: list[list[Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``seconds[name]``."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def start(self) -> None:
        """Mark the start of the first step of a pass."""
        self.marks.append([])
        self.mark()

    def mark(self) -> None:
        """Mark the end of a step; on a GPU by an event, without waiting."""
        if self.device.type != "cuda":
            self.marks[-1].append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks[-1].append(event)

    def steps(self) -> list[float]:
        """Seconds of each step, available once the stage has ended."""
        pairs = [pair for marks in self.marks for pair in pairwise(marks)]
        if self.device.type != "cuda":
            return [after - before for before, after in pairs]
        return [before.elapsed_time(after) / 1000 for before, after in pairs]
