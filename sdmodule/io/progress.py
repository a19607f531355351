"""Progress of a task, with the time left: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from tqdm import tqdm

REFRESH_SECONDS = 0.5
"""Seconds between updates of a bar."""

LINE_SECONDS = 30.0
"""Seconds between lines where the output is no terminal."""

LONG_TASK = 5.0
"""Seconds after which a task that is usually short shows its progress."""


def no_figures() -> dict[str, str]:
    """No figures beside the count."""
    return {}


class Progress:
    """The progress of one task. Only rank 0 shows it, for its own share.

    The time left comes from the pace since the first update, as what comes before it is slower: a compilation, the
    first batch.

    Args:
        what: the task.
        total: number of its items; 0 if it is unknown.
        unit: name of its items, for lines.
        done: number of items that are done at the start.
        show: False shows nothing.
        every: seconds between lines.
        delay: seconds in which nothing is shown yet; a shorter task shows nothing at all.
        leave: whether the bar stays when the task ends.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = "",
        done: float = 0,
        show: bool = True,
        every: float = LINE_SECONDS,
        delay: float = 0.0,
        leave: bool = True,
    ) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = done
        self.show = show and getattr(rank_zero_only, "rank", 0) == 0
        self.terminal = sys.stderr.isatty()
        self.interval = REFRESH_SECONDS if self.terminal else every
        self.leave = leave
        self.shown = False
        self._bar: tqdm[Any] | None = None
        self._start = self._pace = (time.perf_counter(), done)
        self._next = self._start[0] + (delay or self.interval)
        if self.show and self.terminal and not delay:
            self._draw({})

    def update(self, done: float, figures: Callable[[], Mapping[str, str]] = no_figures) -> None:
        """Set the number of items that are done, a part of one included, and show it if it is time to.

        Args:
            done: the number so far.
            figures: further figures to show, by name; called only if they are shown.
        """
        self.done = done
        now = time.perf_counter()
        complete = self._bar is not None and done >= self.total
        if self.show and (now >= self._next or complete):
            self._next = now + self.interval
            (self._draw if self.terminal else self._print)(figures())
        if self._pace == self._start and done > self._start[1]:
            self._pace = (now, done)

    def time_left(self) -> str:
        """Time that the rest takes at the pace so far; ``?`` before anything is done, and without a total."""
        since, before = self._pace if self.done > self._pace[1] else self._start
        if self.done <= before or not self.total:
            return "?"
        seconds = (time.perf_counter() - since) / (self.done - before) * (self.total - self.done)
        return tqdm.format_interval(math.ceil(seconds))

    def redraw(self) -> None:
        """Draw the bar again after something else was shown in its line."""
        if self._bar is not None:
            self._bar.refresh()

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, figures: Mapping[str, str]) -> None:
        if self._bar is None:
            self._bar = tqdm(
                total=self.total or None,
                initial=int(self.done),
                desc=self.what,
                leave=self.leave,
                position=0,  # a task within another takes its line
                dynamic_ncols=True,
                bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix}",
            )
            self._bar.start_t -= time.perf_counter() - self._start[0]
        self.shown = True
        listed = [f"{self.time_left()} left", *(f"{name}={value}" for name, value in figures.items())]
        self._bar.n = int(self.done)
        self._bar.set_postfix_str(", ".join(listed))

    def _print(self, figures: Mapping[str, str]) -> None:
        self.shown = True
        listed = "".join(f", {name} {value}" for name, value in figures.items())
        total = f" of {self.total:,}" if self.total else ""
        unit = f" {self.unit}" if self.unit else ""
        print(f"{self.what}: {int(self.done):,}{total}{unit}{listed}, {self.time_left()} left", flush=True)


@contextmanager
def denoising_bar(total: int, show: bool = True) -> Iterator[Callable[[int, Tensor], None]]:
    """A progress bar of denoising steps, shown only in a terminal; yields the function to call after each step."""
    bar = Progress("denoising", total, "steps", show=show and sys.stderr.isatty(), leave=False)
    try:
        yield lambda done, latents: bar.update(done)
    finally:
        bar.close()


@contextmanager
def progress(total: int, what: str, delay: float = 0.0) -> Iterator[Callable[[int], None]]:
    """Show the progress of a long task; yields the function to call with the number of items just done.

    In a terminal it is a bar, elsewhere lines at the start, at the end and now and then in between.

    Args:
        total: number of items.
        what: the task, for the bar or line.
        delay: seconds in which nothing is shown yet; a shorter task shows nothing at all.
    """
    bar = Progress(what, total, delay=delay, leave=False)
    lines = bar.show and not bar.terminal
    if lines and not delay:
        print(f"{what}: {total:,}", flush=True)
    try:
        yield lambda count: bar.update(bar.done + count)
    finally:
        bar.close()
    if lines and (bar.shown or not delay):
        print(f"{what}: {int(bar.done):,} of {total:,}", flush=True)
