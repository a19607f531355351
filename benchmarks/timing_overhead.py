"""Measure the overhead of `TimingLogger` in training: the time in its hooks, logging included, as a share of a step.

The clock runs inside the hooks while the embedded model trains. The difference between a training with the callback and
one without it would be lost in noise.

Example::

    python benchmarks/timing_overhead.py --json timing_overhead.json
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from benchmarks.report import Parser, main, print_table, report, write_json
from sdmodule import StableDiffusionModule
from sdmodule.callbacks.timing import TimingLogger
from sdmodule.data.toy.dataset import ShapesDataModule

BATCH_SIZES = (1, 4)
"""Images per step; the overhead does not depend on it, so its share is largest for the smallest."""

LOG_EVERY = 10
"""Steps between two logged values, as in ``conf/trainer``."""


class ClockedTimingLogger(TimingLogger):
    """The callback with a clock in its hooks."""

    seconds_in_hooks = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Time the hook."""
        start = time.perf_counter()
        super().on_train_batch_start(*arguments)
        self.seconds_in_hooks += time.perf_counter() - start

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Time the hook."""
        start = time.perf_counter()
        super().on_train_batch_end(*arguments)
        self.seconds_in_hooks += time.perf_counter() - start


def measure(batch_size: int, steps: int) -> dict[str, Any]:
    """Row of a training with the callback."""
    with tempfile.TemporaryDirectory() as folder:
        timing = ClockedTimingLogger(folder)
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=CSVLogger(folder),
            callbacks=[timing],
            limit_val_batches=0,
            log_every_n_steps=LOG_EVERY,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = StableDiffusionModule("tiny")
        trainer.fit(module, ShapesDataModule(batch_size=batch_size, train_length=64))
    step = timing.training_figures(trainer, module)["step_seconds"]["median"]
    each = timing.seconds_in_hooks / steps
    return {
        "batch_size": batch_size,
        "steps": steps,
        "step_ms": round(step * 1e3, 2),
        "hooks_us_a_step": round(each * 1e6, 1),
        "cost_percent": round(100 * each / step, 3),
    }


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, and write the report that ``--json`` asks for."""
    parser = Parser("Measure the overhead of TimingLogger.", quick="10 steps instead of 100")
    settings = parser.parse_args(arguments)
    rows = [measure(batch_size, 10 if settings.quick else 100) for batch_size in BATCH_SIZES]
    print_table(rows)
    result = report([__file__, *arguments], rows)
    if settings.json:
        write_json(settings.json, result)
    return result


if __name__ == "__main__":
    main(run)
