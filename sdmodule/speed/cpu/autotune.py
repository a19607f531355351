"""Which of several equal computations is the fastest here: measured once for each shape, and remembered."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdmodule.io.atomic import write_text_once
from sdmodule.io.fingerprint import fingerprint

TORCH = "torch"
"""The way of torch itself; anything else must be faster by some margin."""

MARGIN = 1.1
"""How many times faster: a choice for good should not hang on a busy moment of the machine."""

TRIALS, FEWEST, PATIENCE = 5, 2, 3.0
"""Of each way: no more than the fewest once so many seconds have passed."""

GENERATION = 9
"""Of the ways that there are; another number has all of them measured anew."""

Ways = Mapping[str, Callable[..., Tensor]]

CHOSEN: dict[Any, str] = {}
"""What this process knows of shapes."""


def fastest(ways: Ways, shape: tuple[Any, ...], *arguments: Any) -> Tensor:
    """Compute something the way that is the fastest for its shape on this machine, or torch's where that cannot.

    Args:
        ways: functions that take the arguments and give the same but for rounding, `TORCH` one of them.
        shape: what the choice depends on.
        arguments: what is computed; measured with, where nothing is known of the shape.
    """
    name = CHOSEN.get(shape)
    if name is None:
        name = CHOSEN[shape] = cached_choice(ways, shape, arguments)
    return ways.get(name, ways[TORCH])(*arguments)


def cached_choice(ways: Ways, shape: tuple[Any, ...], arguments: tuple[Any, ...]) -> str:
    """The name of the fastest way: what was found here earlier, or else what is found now and written down.

    Choices lie in ``~/.cache/sdmodule/kernels``. Where that cannot be written, each process measures by itself.
    """
    file = autotune_cache_dir() / fingerprint(*shape)
    with suppress(OSError, UnicodeDecodeError):
        if (name := file.read_text(encoding="utf-8")) in ways:
            return name
    name = measure_fastest(ways, arguments)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        settled = write_text_once(file, name)  # the processes of a run choose alike: the first one's choice holds
        return settled if settled in ways else name
    return name


def measure_fastest(ways: Ways, arguments: tuple[Any, ...]) -> str:
    """The name of the fastest way; they run in turn, and the best of their times are compared."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    begun = time.perf_counter()
    for trial in range(1 + TRIALS):  # the first warms up
        if trial > FEWEST and time.perf_counter() - begun > PATIENCE:
            break
        for name, way in ways.items():
            start = time.perf_counter()
            way(*arguments)
            seconds[name].append(time.perf_counter() - start)
    best = {name: min(taken[1:]) for name, taken in seconds.items()}
    fast = min(best, key=lambda name: best[name])
    return fast if best[fast] * MARGIN < best[TORCH] else TORCH


@cache
def autotune_cache_dir() -> Path:
    """Where this machine's choices are kept: those of a processor, a version of torch and a number of threads."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    # generations of one vendor may share a name, and machines of one name be allowed less of what it can do
    metadata = ("model name", "cpu family", "model\t", "flags")
    named = (next((line for line in lines if line.startswith(fact)), "") for fact in metadata)
    processor = (*named, platform.processor())
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    machine = (
        GENERATION,
        *processor,
        torch.backends.cpu.get_cpu_capability(),
        torch.__version__,
        torch.get_num_threads(),
    )
    return home / "sdmodule" / "kernels" / fingerprint(*machine)
