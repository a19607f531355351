"""Autotuning: of several kernels for one computation, the fastest for a shape on this machine, measured once."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdmodule.io.atomic import write_text_once
from sdmodule.io.cache_dir import cache_dir
from sdmodule.io.fingerprint import fingerprint

TORCH = "torch"
"""Name of the default candidate, which another one must beat by `MARGIN`."""

MARGIN = 1.03
"""Speed-up at which another candidate is taken."""

TRIALS, MIN_TRIALS, PATIENCE = 7, 3, 3.0
"""Timed calls of each candidate: `TRIALS`, or `MIN_TRIALS` once `PATIENCE` seconds have passed."""

GENERATION = 10
"""Version of the set of candidates; raising it makes every machine measure again."""

Candidates = Mapping[str, Callable[..., Tensor]]

CHOSEN: dict[Any, str] = {}
"""Choices that this process knows, by shape."""


def fastest(candidates: Candidates, shape: tuple[Any, ...], *arguments: Any) -> Tensor:
    """Run the candidate that is fastest for a shape on this machine.

    Args:
        candidates: functions of the arguments with results equal but for rounding; one is named `TORCH`.
        shape: what the choice depends on.
        arguments: the arguments; an unknown shape is measured on them.
    """
    name = CHOSEN.get(shape)
    if name is None:
        name = CHOSEN[shape] = cached_choice(candidates, shape, arguments)
    return candidates.get(name, candidates[TORCH])(*arguments)


def cached_choice(candidates: Candidates, shape: tuple[Any, ...], arguments: tuple[Any, ...]) -> str:
    """Name of the fastest candidate, read from the cache or else measured and written to it.

    The cache is ``~/.cache/sdmodule/kernels``. Where it cannot be written, each process measures for itself.
    """
    file = autotune_cache_dir() / fingerprint(*shape)
    with suppress(OSError, UnicodeDecodeError):
        if (name := file.read_text(encoding="utf-8")) in candidates:
            return name
    name = measure_fastest(candidates, arguments)
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        settled = write_text_once(file, name)  # all processes of a run take the choice of the first one
        return settled if settled in candidates else name
    return name


def measure_fastest(candidates: Candidates, arguments: tuple[Any, ...]) -> str:
    """Name of the fastest candidate: they run in turn, and their medians are compared.

    A choice is permanent, so it must not depend on a busy moment; and where the machine is always shared, the median
    shows which kernel bears it best.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    begun = time.perf_counter()
    for trial in range(1 + TRIALS):  # the first is the warm-up
        if trial > MIN_TRIALS and time.perf_counter() - begun > PATIENCE:
            break
        for name, kernel in candidates.items():
            start = time.perf_counter()
            kernel(*arguments)
            seconds[name].append(time.perf_counter() - start)
    typical = {name: statistics.median(timed[1:]) for name, timed in seconds.items()}
    winner = min(typical, key=lambda name: typical[name])
    return winner if typical[winner] * MARGIN < typical[TORCH] else TORCH


@cache
def autotune_cache_dir() -> Path:
    """Folder of the choices for this processor, version of torch and number of threads."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    # generations of one vendor may share a name, and a virtual machine may hide some flags of its processor
    keys = ("model name", "cpu family", "model\t", "flags")
    found = (next((line for line in lines if line.startswith(key)), "") for key in keys)
    processor = (*found, platform.processor())
    machine = (
        GENERATION,
        *processor,
        torch.backends.cpu.get_cpu_capability(),
        torch.__version__,
        torch.get_num_threads(),
    )
    return cache_dir() / "kernels" / fingerprint(*machine)
