"""Progress of a run: a bar in a terminal, an occasional line anywhere else."""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch import callbacks
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from sdmodule.callbacks.timing import TimingLogger
from sdmodule.sampling.result import Samples

REFRESH_SECONDS = 0.5
"""Seconds between updates of a bar's figures; reading a loss waits for the GPU."""


class ProgressBar(callbacks.ProgressBar):
    """One bar for training (loss, samples per second, data wait, time left), one for sampling (images, steps).

    Lightning's own bars count the batches of an epoch; this one counts optimizer steps of the whole training, and
    images.

    Args:
        show: False shows nothing.
        every: seconds between lines if the output is not a terminal.
    """

    def __init__(self, show: bool = True, every: float = 30.0) -> None:
        super().__init__()
        self.show = show
        self.every = every
        self.terminal = sys.stderr.isatty()
        self.bar: tqdm[Any] | None = None
        self._last_update = 0.0
        self._step_reports = ExitStack()

    @override
    def disable(self) -> None:
        self.show = False

    @override
    def enable(self) -> None:
        self.show = True

    def _begin(self, description: str, unit: str, total: int, done: int) -> None:
        self._start = self._last_update = time.perf_counter()
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=description,
            unit=unit,
            disable=not self.show or not self.terminal,
            dynamic_ncols=True,
            bar_format="{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}, {remaining} left{postfix}",
        )
        self._description, self._unit, self._total = description, unit, total
        self._initial = self._done = done

    def _advance(self, done: int, figures: dict[str, str]) -> None:
        """Show how much is done, in the bar or on a line of its own."""
        self._done = done
        self._last_update = time.perf_counter()
        if self.bar is None or not self.show:
            return
        if self.terminal:
            self.bar.set_postfix(figures, refresh=False)
            self.bar.update(done - self.bar.n)
            return
        seconds_each = (self._last_update - self._start) / max(done - self._initial, 1)
        left = tqdm.format_interval(seconds_each * (self._total - done)) if done > self._initial else "?"
        listed = "".join(f", {name} {value}" for name, value in figures.items())
        print(f"{self._description}: {done} of {self._total} {self._unit}s{listed}, {left} left", flush=True)

    def _is_due(self) -> bool:
        interval = REFRESH_SECONDS if self.terminal else self.every
        return self.show and time.perf_counter() - self._last_update >= interval

    def _end(self) -> None:
        self._step_reports.close()
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    # ---------------------------------------------------------------------------------------------- training

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin("training", "step", trainer.max_steps, trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        last = self.terminal and trainer.global_step == trainer.max_steps
        if trainer.global_step > self._done and (last or self._is_due()):
            self._advance(trainer.global_step, self._training_figures(trainer, pl_module))

    @staticmethod
    def _training_figures(trainer: Trainer, pl_module: LightningModule) -> dict[str, str]:
        figures = {}
        if (loss := trainer.callback_metrics.get("train/loss")) is not None:
            figures["loss"] = f"{loss:.4f}"
        timing = next((c for c in trainer.callbacks if isinstance(c, TimingLogger)), None)  # type: ignore[attr-defined]
        if timing is not None and timing.steps:
            recent = timing.training_figures(trainer, pl_module, 50)
            figures |= {"samples/s": f"{recent['samples_per_second']:.3g}", "data wait": f"{recent['data_wait']:.0%}"}
        return figures

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None:
            self.bar.set_description_str("validating")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.bar is not None:
            self.bar.set_description_str("training")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    # ---------------------------------------------------------------------------------------------- sampling

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        batches = getattr(getattr(trainer.predict_dataloaders, "dataset", None), "batches", [])
        self._begin("sampling", "image", sum(request.kept for batch in batches for request in batch), 0)
        steps = pl_module.sampling.steps_taken  # type: ignore[union-attr]

        def on_step(done: int, latents: Tensor) -> None:
            if self._is_due():
                self._advance(self._done, {"step": f"{done}/{steps}"})

        self._step_reports.enter_context(pl_module.step_reports(on_step))  # type: ignore[operator]

    @override
    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Samples,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        done = self._done + sum(request.kept for request in outputs.requests)
        if self.terminal or self._is_due():
            self._advance(done, {})
        self._done = done

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()
