"""Measure what `TimingLogger` costs a training: the time spent in its hooks, logging included, against a step's time.

The clock runs inside the hooks of a real training of the embedded model. The difference between a training with them
and one without would drown in the noise of the machine.

Example::

    python benchmarks/timing_overhead.py --json timing_overhead.json
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger

from benchmarks.report import print_table, report, write_json
from sdmodule import StableDiffusionModule
from sdmodule.callbacks.timing import TimingLogger
from sdmodule.data.toy.dataset import ShapesDataModule

BATCH_SIZES = (1, 4)
"""Images a step; the cost is the same for any, so the smallest is the hardest."""

LOG_EVERY = 10
"""Steps between figures for the logger, as in ``conf/trainer``."""


class Watched(TimingLogger):
    """The callback with a clock in it."""

    own = 0.0

    def on_train_batch_start(self, *arguments: Any) -> None:
        """Time the hook."""
        start = time.perf_counter()
        super().on_train_batch_start(*arguments)
        self.own += time.perf_counter() - start

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Time the hook."""
        start = time.perf_counter()
        super().on_train_batch_end(*arguments)
        self.own += time.perf_counter() - start


def measure(batch_size: int, steps: int) -> dict[str, Any]:
    """Train with the callback; a row of the result."""
    with tempfile.TemporaryDirectory() as folder:
        timing = Watched(folder)
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
    each = timing.own / steps
    return {
        "batch_size": batch_size,
        "steps": steps,
        "step_ms": round(step * 1e3, 2),
        "hooks_us_a_step": round(each * 1e6, 1),
        "cost_percent": round(100 * each / step, 3),
    }


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, and write the report that ``--json`` asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the report")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    settings = parser.parse_args(arguments)
    rows = [measure(batch_size, 10 if settings.quick else 100) for batch_size in BATCH_SIZES]
    print_table(rows)
    result = report([__file__, *arguments], rows)
    if settings.json:
        write_json(settings.json, result)
    return result


if __name__ == "__main__":
    run(sys.argv[1:])
