"""What a command prints while it runs, and how it ends when it is interrupted."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdmodule.training.slurm import REQUEUE_SIGNAL

if TYPE_CHECKING:
    from lightning import Trainer


def echo(text: str) -> None:
    """Print a line, from the first process only."""
    if is_rank_zero():
        print(text, flush=True)


def echo_device(trainer: Trainer, tf32: bool, **in_effect: str) -> None:
    """Print what a run computes on and how, the first line that every run prints.

    Args:
        trainer: of the run.
        tf32: whether float32 matrices are multiplied in TF32.
        in_effect: further settings as they take effect on the device, such as the attention backend.
    """
    import torch

    device = trainer.strategy.root_device
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    name = f" ({torch.get_num_threads()} threads)" if device.type == "cpu" else name
    count = f"{trainer.world_size} x " if trainer.world_size > 1 else ""
    settings = {"precision": f"{trainer.precision}{' with TF32' if tf32 else ''}", **in_effect}
    echo(f"On {count}{device.type}{name}: {', '.join(f'{key} {value}' for key, value in settings.items())}")


def is_rank_zero() -> bool:
    """Whether this is the process that prints and writes for all devices."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def configured_loggers(trainer: Trainer, config: dict[str, Any], output_dir: Path) -> Iterator[None]:
    """Log the configuration, say where W&B keeps the run, and close that run when the block ends."""
    with ExitStack() as stack:
        if any("wandb" in type(logger).__name__.lower() for logger in trainer.loggers):
            from sdmodule.cli.wandb_logger import wandb_run

            stack.enter_context(wandb_run(output_dir))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
            if is_rank_zero() and (location := getattr(logger, "location", str)()):
                echo(location)
        yield


@contextmanager
def report_interrupts(trainer: Trainer, output_dir: Path) -> Iterator[None]:
    """Say how to resume after Ctrl-C (exit status 130), SIGTERM (143) or SLURM's signal, once a checkpoint is saved."""
    try:
        yield
    except SystemExit as end:
        if not trainer.interrupted:
            raise
        last = getattr(trainer.checkpoint_callback, "last_model_path", "")
        resume = f"; resume with ckpt_path={last}" if last else ""
        print(f"interrupted: what is done is in {output_dir}{resume}", file=sys.stderr)
        sys.exit(end.code if end.code in (143, 128 + REQUEUE_SIGNAL) else 130)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """End the block at once on SIGTERM; Lightning alone only notes the signal, and predict would run to its end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
