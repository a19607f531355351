"""Timing of the stages and steps of sampling."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

Span = tuple[Any, Any]
"""Start and end: seconds of the host's clock, or events of a GPU."""


class Stopwatch:
    """Seconds per stage and per denoising step; on a GPU by events, which are waited for when a figure is read.

    Args:
        device: that the model is on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stages: dict[str, list[Span]] = {}
        self.marks: list[list[Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time of the block to ``seconds[name]``."""
        start = self._now()
        yield
        self.stages.setdefault(name, []).append((start, self._now()))

    def start(self) -> None:
        """Mark the start of the first step of a pass."""
        self.marks.append([])
        self.mark()

    def mark(self) -> None:
        """Mark the end of a step."""
        self.marks[-1].append(self._now())

    @property
    def seconds(self) -> StageSeconds:
        """Seconds of each stage that has ended."""
        return StageSeconds(self.stages)

    def steps(self) -> StepSeconds:
        """Seconds of each step."""
        return StepSeconds([pair for marks in self.marks for pair in pairwise(marks)])

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))  # not that of the current device
        return event


class StageSeconds:
    """Seconds of each stage, worked out when they are read.

    Not a ``Mapping``, which Lightning would read through when it collects predictions.
    """

    def __init__(self, stages: Mapping[str, Sequence[Span]]) -> None:
        self.stages = stages

    def __getitem__(self, name: str) -> float:
        return sum(map(elapsed, self.stages[name]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.stages)

    def keys(self) -> Iterator[str]:
        """Names of the stages."""
        return iter(self.stages)

    def values(self) -> list[float]:
        """Seconds of the stages."""
        return [self[name] for name in self.stages]


class StepSeconds:
    """Seconds of each step, worked out when they are read; for the same reason not a ``Sequence``."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = spans

    def __iter__(self) -> Iterator[float]:
        return map(elapsed, self.spans)

    def __len__(self) -> int:
        return len(self.spans)


def elapsed(span: Span) -> float:
    """Seconds between the start and the end of a span; waits for a GPU that has not got there."""
    start, end = span
    if isinstance(end, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
