"""One run of ``benchmarks/gpu.py``: its rows, its time, and the models that its sections share."""

from __future__ import annotations

import copy
import gc
import io
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import sdmodule
from benchmarks.tome_runs import load
from sdmodule.components.checkpoint import Components

HINT = "HYDRA_FULL_ERROR"
"""In the line below an error."""

PACKAGE = str(Path(sdmodule.__file__).parent)


@dataclass
class GpuRun:
    """What has been measured, and how much time is left.

    Attributes:
        dry: on the CPU, with the embedded model and as few steps as there can be.
        folder: for temporary files.
        ends: when the whole run must end, of ``time.perf_counter``.
        rows: results; ``passed`` is there where something is checked.
        section: that runs.
        section_ends: when it must end.
    """

    dry: bool
    folder: Path
    ends: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    section: str = ""
    section_ends: float = 0.0

    @property
    def device(self) -> str:
        """Where everything runs."""
        return "cpu" if self.dry else "cuda"

    @property
    def left(self) -> float:
        """Seconds left to the section."""
        return min(self.section_ends, self.ends) - time.perf_counter()

    def run_section(self, name: str, seconds: float, section: Callable[[GpuRun], None]) -> None:
        """Run a section in at most so many seconds."""
        self.section, start = name, time.perf_counter()
        self.section_ends = start + seconds
        if self.fits("section", 5):
            with self.attempt("section"):
                section(self)
        self.row("took", seconds=round(time.perf_counter() - start, 1))
        self.empty_memory()

    def row(self, what: str, **figures: Any) -> None:
        """Add a row of the table."""
        self.rows.append({"section": self.section, "what": what, **figures})
        print(
            self.section, what, ", ".join(f"{name}={value}" for name, value in figures.items()), sep=" | ", flush=True
        )

    def fits(self, what: str, seconds: float) -> bool:
        """Whether something still fits into the section's budget; a row says so if not."""
        if self.left < seconds:
            self.row(what, skipped=f"takes {seconds:.0f} s, {max(self.left, 0):.0f} s are left")
        return self.left >= seconds

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Turn an error inside the block into a failed row with the line of this package that raised it."""
        try:
            yield
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            own = [frame for frame in frames if frame.filename.startswith(PACKAGE)] or frames
            place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
            text = " ".join(f"{type(error).__name__}: {error}".split())
            self.row(what, passed=False, error=text[:300], place=place)

    @cached_property
    def _model(self) -> Components:
        """Stable Diffusion 1.5's architecture with random weights, or the embedded model, in float32 on the CPU."""
        parts = load("tiny" if self.dry else None, "float32")
        for network in parts.networks.values():  # in the format of ``from_pretrained``
            network.to("cpu", memory_format=torch.contiguous_format)
        return parts

    def model(self, precision: str) -> Components:
        """A copy of the model on the device, as ``float32``, ``float16`` or ``bfloat16``."""
        self.empty_memory()
        parts = copy.deepcopy(self._model)
        for network in parts.networks.values():
            network.to(self.device, getattr(torch, precision))
        return parts

    def empty_memory(self) -> None:
        """Free what is no longer used, and count peak memory from here on."""
        gc.collect()
        if not self.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_memory(self) -> float | None:
        """Peak memory of the GPU in GiB since `empty_memory`."""
        return None if self.dry else round(torch.cuda.max_memory_allocated() / 2**30, 2)

    def now(self) -> float:
        """The time once the device is idle."""
        if not self.dry:
            torch.cuda.synchronize()
        return time.perf_counter()

    def command(self, main: Callable[[], None], *overrides: str) -> None:
        """Run one of the two commands in this process.

        Raises:
            RuntimeError: with the last line of its output that names an error, if it fails.
        """
        output = io.StringIO()
        trainer = [] if any(word.startswith("trainer=") for word in overrides) else [f"trainer={self.trainer}"]
        with (
            patch.object(sys, "argv", ["command", *overrides, *trainer]),
            redirect_stdout(output),
            redirect_stderr(output),
        ):
            try:
                main()
            except SystemExit as end:
                if end.code:
                    lines = output.getvalue().strip().splitlines() or [str(end.code)]
                    told = [line for line in lines if re.search("error", line, re.IGNORECASE) and HINT not in line]
                    raise RuntimeError((told or lines)[-1]) from end

    @property
    def trainer(self) -> str:
        """The value of ``trainer=`` for one device."""
        return "cpu" if self.dry else "gpu"
