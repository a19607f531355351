"""Checkpoints from which a training resumes as if it had never stopped."""

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
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from sdmodule.errors import SettingsError, choices
from sdmodule.io.redact import redact
from sdmodule.training.loop_state import LoopState, write_loop_state
from sdmodule.training.signal_guard import SignalGuard, SignalPoll
from sdmodule.training.slurm import REQUEUE_SIGNAL, end_for_requeue


class StoppedBySignal(SystemExit):
    """Ends a training after a signal, with the exit status that shells use, such as 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)


class TrainingCheckpoint(ModelCheckpoint):
    """Lightning's `ModelCheckpoint`, resumable at every step to the bit.

    A checkpoint is the state at the end of a step, whenever it is written: batches of the next step that were read
    already, and an unfinished validation, are repeated after resuming (`LoopState`). Loggers flush their metrics before
    a checkpoint is written. The last step is always saved, whatever ``every_n_train_steps`` is.

    Ctrl-C and SIGTERM save a checkpoint too and then end the training: at once, even in a validation or while waiting
    for data, but not within an optimizer step, which finishes first. Several devices stop together after the step or
    validation batch that they are at, on GPUs within seconds. A second Ctrl-C ends without a checkpoint. The signal by
    which SLURM asks to be requeued acts likewise, within `requeued_on_signal`.

    With ``monitor="val/fid"``, or another metric of the validation, the checkpoint that is kept beside ``last.ckpt`` is
    that of the best validation.

    Paths in its state, which every checkpoint holds, are written with ``~`` for the home folder.
    """

    _loop_state: LoopState | None = None  # at the end of the last step
    _in_step = False  # the optimizer has changed some weights, and not all
    _defer_signals = False
    _signal: int | None = None
    _guard: SignalGuard | None = None
    _poll = SignalPoll()

    # ---------------------------------------------------------------------------------------------- steps

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._loop_state, self._in_step, self._defer_signals, self._signal = None, False, False, None
        self._start_step, self._poll = trainer.global_step, SignalPoll()
        self._install_signal_handlers(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._finish_step(trainer, pl_module)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._in_step = self._defer_signals = True

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != (self._loop_state.step if self._loop_state else self._start_step):
            self._in_step, self._defer_signals = False, True
            self._loop_state = LoopState(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_step(trainer, pl_module)

    @override
    def on_validation_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._stop_if_signalled(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loop_state is not None:
            self._loop_state.validation_finished(trainer)
        with self._signals_deferred():
            if self.monitor is not None and not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
                self._save_if_best(trainer)
            super().on_validation_end(trainer, pl_module)
        self._stop_if_signalled(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish_step(trainer, pl_module)
        with self._signals_deferred():
            super().on_train_epoch_end(trainer, pl_module)
        self._stop_if_signalled(trainer)

    def _finish_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the step that just ended if it is due: after its metrics are logged, before EMA weights are swapped in.

        Lightning would save in ``on_train_batch_end``, which is too early for the former.
        """
        if not self._defer_signals:
            return
        if self.monitor is None:
            super().on_train_batch_end(trainer, pl_module, None, None, 0)
        elif self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0:
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))  # the metric is not yet this step's
        if trainer.global_step >= trainer.max_steps and not self._should_skip_saving_checkpoint(trainer):
            save = self._save_last_checkpoint if self.save_last else self._save_topk_checkpoint
            save(trainer, self._monitor_candidates(trainer))
        self._defer_signals = False
        if self._poll.due(trainer):
            self._stop_if_signalled(trainer)

    def _save_if_best(self, trainer: Trainer) -> None:
        """Save after a validation that was better than those before, whatever ``every_n_train_steps`` is.

        Raises:
            SettingsError: if the validation has not logged what is monitored.
        """
        candidates = self._monitor_candidates(trainer)
        if self.monitor not in candidates:
            raise SettingsError(
                f"callbacks.checkpoint.monitor={self.monitor}: the validation logs no such metric; choose one of "
                f"{choices(name for name in candidates if name.startswith('val/'))}."
            )
        self._save_topk_checkpoint(trainer, candidates)

    # ---------------------------------------------------------------------------------------------- files

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._loop_state is not None:
            write_loop_state(checkpoint, self._loop_state)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        for logger in trainer.loggers:
            logger.save()
        super()._save_checkpoint(trainer, filepath)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the last whole step, whatever ends the training: unless it was the first, or a step had begun.

        If one of several devices fails, it saves alone, since it has all that there is to save; where the others have
        parts of the model, nothing is saved.
        """
        self._release_guard()
        if self._loop_state is None or self._in_step:
            return
        with self._signals_deferred():
            if trainer.world_size == 1 or isinstance(exception, StoppedBySignal):
                super().on_exception(trainer, pl_module, exception)
            elif isinstance(trainer.strategy, DDPStrategy) and self._should_save_on_exception(trainer):
                self._save_alone(trainer)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release_guard()
        super().teardown(trainer, pl_module, stage)

    def _release_guard(self) -> None:
        if self._guard is not None:
            self._guard.release()
            self._guard = None

    def _save_alone(self, trainer: Trainer) -> None:
        """Write ``last.ckpt`` without waiting for other devices."""
        path = self.format_checkpoint_name(self._monitor_candidates(trainer), self.CHECKPOINT_NAME_LAST)
        self.last_model_path = path
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)

    @property
    @override
    def state_key(self) -> str:
        """Lightning's key without ``every_n_train_steps``, so that the state is found again if that changes."""
        return self._generate_state_key(
            monitor=self.monitor, mode=self.mode, filename=self.filename, save_top_k=self.save_top_k
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return _map_paths(super().state_dict(), redact)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(_map_paths(state_dict, lambda path: str(Path(path).expanduser()) if path else path))

    # ---------------------------------------------------------------------------------------------- signals

    def _install_signal_handlers(self, trainer: Trainer) -> None:
        """Take SIGINT and SIGTERM from Lightning, which restores the original handlers when the training ends."""
        if threading.current_thread() is not threading.main_thread():
            return

        def handle(number: int, frame: FrameType | None) -> None:
            if self._signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            self._signal = number
            if not self._defer_signals and trainer.world_size == 1:
                raise StoppedBySignal(number)

        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        numbers += [REQUEUE_SIGNAL] if signal.getsignal(REQUEUE_SIGNAL) is end_for_requeue else []
        for number in numbers:
            signal.signal(number, handle)
        if trainer.world_size > 1:
            self._guard = SignalGuard(numbers)

    def _stop_if_signalled(self, trainer: Trainer) -> None:
        """End the training, on all devices if one of them received a signal."""
        if self._poll.ask(trainer, self._signal is not None):
            raise StoppedBySignal(self._signal or signal.SIGTERM)

    @contextmanager
    def _signals_deferred(self) -> Iterator[None]:
        """Keep a signal from interrupting the block; `_stop_if_signalled` acts on it afterwards."""
        before, self._defer_signals = self._defer_signals, True
        try:
            yield
        finally:
            self._defer_signals = before


def _map_paths(state: dict[str, Any], change: Any) -> dict[str, Any]:
    """A `ModelCheckpoint`'s state with ``change`` applied to all strings in it, paths among them."""
    changed = {name: change(value) if isinstance(value, str) else value for name, value in state.items()}
    return changed | {"best_k_models": {change(path): score for path, score in state["best_k_models"].items()}}
