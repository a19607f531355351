"""Checkpoints from which a training goes on as if it had never been stopped."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from sdmodule.io.redact import redact
from sdmodule.training.loop_state import LoopState, write_loop_state


class Stopped(SystemExit):
    """Ends a training after a signal, with the status that shells give to it: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class TrainingCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, exact.

    A checkpoint is of the end of a step, whenever it is written: batches of the next step that were seen already, and
    a validation that was not finished, are seen and made again (`LoopState`). Figures of the steps that it holds are
    in the loggers' files before it is written. There is one of the last step, whatever ``every_n_train_steps``.

    Ctrl-C and SIGTERM leave one too: at once, in a validation or a wait for data as well, but for an optimizer's step,
    which comes to its end. Several devices stop together after the step or the batch of validation that they are at.
    Ctrl-C for a second time ends without a checkpoint.

    Paths in its state, which every checkpoint holds, begin with ``~`` for the home folder.
    """

    _point: LoopState | None = None
    _busy = False
    _received: int | None = None

    # ---------------------------------------------------------------------------------------------- steps

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._point, self._busy, self._received = None, False, None
        self._start_step = trainer.global_step
        self._listen(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._settle(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._busy = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != (self._point.step if self._point else self._start_step):
            self._busy = True
            self._point = LoopState(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer, pl_module)

    @override
    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._stop_if_told(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._point is not None:
            self._point.validation_finished(trainer)
        with self._undisturbed():
            super().on_validation_end(trainer, pl_module)
        self._stop_if_told(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._settle(trainer, pl_module)
        with self._undisturbed():
            super().on_train_epoch_end(trainer, pl_module)
        self._stop_if_told(trainer)

    def _settle(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is to be done after a step, once its figures are logged, and before averaged weights are put in."""
        if not self._busy:
            return
        super().on_train_batch_end(trainer, pl_module, None, None, 0)
        if trainer.global_step >= trainer.max_steps and not self._should_skip_saving_checkpoint(trainer):
            save = self._save_last_checkpoint if self.save_last else self._save_topk_checkpoint
            save(trainer, self._monitor_candidates(trainer))
        self._busy = False
        self._stop_if_told(trainer)

    # ---------------------------------------------------------------------------------------------- files

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._point is not None:
            write_loop_state(checkpoint, self._point)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for logger in trainer.loggers:
            logger.save()
        super()._save_checkpoint(trainer, filepath)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what can be gone on from: nothing before the first step, and nothing of half a step.

        Nor where one of several devices fails, since to save is the work of all.
        """
        alone = trainer.world_size > 1 and not isinstance(exception, Stopped)
        if self._point is None or self._busy or alone:
            return
        with self._undisturbed():
            super().on_exception(trainer, pl_module, exception)

    @property
    @override
    def state_key(self) -> str:
        """Lightning's has ``every_n_train_steps`` too, and would not know its own state if that is changed."""
        return self._generate_state_key(
            monitor=self.monitor, mode=self.mode, filename=self.filename, save_top_k=self.save_top_k
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return _with_paths(super().state_dict(), redact)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_with_paths(state_dict, lambda path: str(Path(path).expanduser()) if path else path))

    # ---------------------------------------------------------------------------------------------- signals

    def _listen(self, trainer: Trainer) -> None:
        """Take SIGINT and SIGTERM from Lightning, which puts back what was before it when the training ends."""
        if threading.current_thread() is not threading.main_thread():
            return

        def note(number: int, frame: FrameType | None) -> None:
            if self._received is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._received = number
            if not self._busy and trainer.world_size == 1:
                raise Stopped(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, note)

    def _stop_if_told(self, trainer: Trainer) -> None:
        """End, on all devices if one of them was told to."""
        if trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            raise Stopped(self._received or signal.SIGTERM)

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Let no signal end the block; it ends what comes behind it."""
        before, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = before


def _with_paths(state: dict[str, Any], change: Any) -> dict[str, Any]:
    changed = {name: change(value) if isinstance(value, str) else value for name, value in state.items()}
    return changed | {"best_k_models": {change(path): score for path, score in state["best_k_models"].items()}}
