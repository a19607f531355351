"""A page on a training, written anew at each validation."""

from __future__ import annotations

import json
import platform
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from sdmodule.callbacks.validation_interval import ValidationInterval
from sdmodule.errors import count_of
from sdmodule.io.atomic import atomic_write_text
from sdmodule.io.noted_warnings import noted_warnings
from sdmodule.io.redact import shorten_home
from sdmodule.io.run_folder import PAGE, REPORT
from sdmodule.io.training_report import read_report, write_training_page


class TrainingReport(Callback):
    """Write ``index.html``, a page on the training, at each validation and at the end; and log the learning rate.

    The page shows the curves of ``metrics.csv``, the sheets of `ValidationSamples`, the settings and figures of
    ``config.yaml`` and ``timings.json``, as far as they are there. What it needs beside them is in ``report.json``:
    hardware, warnings, whether the training runs or how it ended. A training that resumes keeps both.

    Goes after `ValidationSamples` and `TimingLogger`, whose files it shows.

    Args:
        output_dir: folder of the training.

    Attributes:
        warnings: that the page shows.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)
        self.warnings: list[str] = []
        self._noting = ExitStack()
        self._report: dict[str, Any] = {}
        self._rates: dict[str, float] = {}
        self._steps_done = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._noting.close()
        noted = self._noting.enter_context(noted_warnings())
        noted += self.warnings
        self.warnings = noted

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._noting.close()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps_done = trainer.global_step
        if not trainer.is_global_zero:
            return
        resumed = trainer.global_step > 0
        before = read_report(self.output_dir) if resumed else {}
        self.warnings[:] = dict.fromkeys([*before.get("warnings", []), *self.warnings])
        starts = [*before.get("starts", []), {"time": _now(), "step": trainer.global_step}]
        self._report = {"starts": starts, "hardware": hardware(trainer), "figures": figures(pl_module, starts)}
        self._write(trainer, "running")

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._rates = learning_rates(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._steps_done or not trainer.is_global_zero:
            return
        self._steps_done = trainer.global_step
        if self._rates:
            for logger in trainer.loggers:
                logger.log_metrics(self._rates, trainer.global_step)
            self._rates = {}
        if not trainer.val_dataloaders and self._steps_done % _steps_between_sheets(trainer) == 0:
            self._write(trainer, "running")

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._write(trainer, "running")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        ended = trainer.global_step >= trainer.max_steps or trainer.max_steps == -1
        self._write(trainer, "finished" if ended else "stopped")

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._noting.close()
        if self._report:
            interrupted = isinstance(exception, KeyboardInterrupt)
            told = shorten_home(" ".join(str(exception).split()))
            self._write(trainer, "interrupted" if interrupted else f"failed ({type(exception).__name__}: {told})")

    def _write(self, trainer: Trainer, state: str) -> None:
        if not trainer.is_global_zero:
            return
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()  # which it does every 100 steps
        of = f" of {trainer.max_steps:,}" if trainer.max_steps > 0 else ""
        told = f"{state}: {trainer.global_step:,}{of} steps at {_now()}"
        report = {"state": told, "warnings": self.warnings, **self._report}
        name = self.output_dir.absolute().name
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            atomic_write_text(self.output_dir / REPORT, json.dumps(report, indent=2) + "\n")
            write_training_page(self.output_dir / PAGE, name, {name: self.output_dir})
        except OSError as error:  # a training need not end for it
            rank_zero_warn(f"{self.output_dir / PAGE}: could not be written ({error}); it shows what was before.")


def learning_rates(trainer: Trainer) -> dict[str, float]:
    """The learning rate as ``train/lr``; of several groups of weights, as ``train/lr_0`` and so on, if they differ."""
    rates = [float(group["lr"]) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if len(set(rates)) <= 1:
        return {"train/lr": rates[0]} if rates else {}
    return {f"train/lr_{number}": rate for number, rate in enumerate(rates)}


def hardware(trainer: Trainer) -> dict[str, str]:
    """What a training computes on, and with which versions."""
    device = trainer.strategy.root_device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    name = gpu or f"{device.type}, {count_of(torch.get_num_threads(), 'thread')}"
    return {
        "device": f"{trainer.world_size} x {name}" if trainer.world_size > 1 else name,
        "precision": str(trainer.precision),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "torch": str(torch.__version__),
    }


def figures(module: LightningModule, starts: list[dict[str, Any]]) -> dict[str, str]:
    """Size of a training, and when it was started."""
    trained = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    total = sum(weight.numel() for weight in module.parameters())
    resumed = [f"resumed at step {start['step']:,}, {start['time']}" for start in starts[1:]]
    return {
        "trained parameters": f"{trained:,} of {total:,}",
        "started": "; ".join([starts[0]["time"], *resumed]),
    }


def _steps_between_sheets(trainer: Trainer) -> int:
    """Steps between validation images without validation data; those of the whole training if there is no interval."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    intervals = [callback.steps for callback in callbacks if isinstance(callback, ValidationInterval)]
    return intervals[0] if intervals and intervals[0] else max(trainer.max_steps, 1)


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
