"""The Lightning trainer that both commands use."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.plugins import Precision
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from sdmodule.callbacks.cudnn_benchmark import CudnnBenchmark
from sdmodule.callbacks.finite_loss import STOP, NonFiniteLoss
from sdmodule.callbacks.frozen_weights import CastFrozenWeights
from sdmodule.callbacks.rank_watch import EndWithLostRank
from sdmodule.callbacks.validation_interval import ValidationInterval
from sdmodule.errors import SettingsError, check_int
from sdmodule.training.checkpoint_io import AtomicCheckpointIO
from sdmodule.training.precision import FusedMixedPrecision
from sdmodule.training.strategies import make_strategy

BF16_MIXED: Final = "bf16-mixed"
MIXED = (BF16_MIXED, "16-mixed")


def make_trainer(
    accelerator: str = "auto",
    max_steps: int = 1000,
    val_check_interval: int = 250,
    accumulate_grad_batches: int = 1,
    precision: str | None = None,
    log_every_n_steps: int = 10,
    nan_loss: str = STOP,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Trainer:
    """A Lightning trainer, its settings checked against each other and against the machine.

    Args:
        accelerator: ``gpu``, ``cpu``, or ``auto``: the GPU where there is one.
        max_steps: optimizer steps of the training.
        val_check_interval: optimizer steps between validations, counted across epochs; a shorter training validates
            once, at its end.
        accumulate_grad_batches: batches per optimizer step.
        precision: one of Lightning's, or one that `resolve_precision` knows.
        log_every_n_steps: optimizer steps between logged metrics.
        nan_loss: what to do with a step whose loss is NaN or inf: ``stop`` or ``skip``.
        callbacks: all callbacks; without one of the kind there are no checkpoints and no progress bar.
        settings: further arguments of ``lightning.Trainer``.

    Raises:
        SettingsError: if there is no GPU to use, the strategy is refused, or Lightning refuses the settings.
    """
    settings["strategy"] = make_strategy(settings.get("strategy", "auto"))
    has_gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    if accelerator == "auto":
        accelerator = "gpu" if has_gpu else "cpu"
    if accelerator == "gpu" and not has_gpu:
        raise SettingsError("trainer=gpu: torch finds no GPU on this machine; use trainer=cpu or trainer=auto.")
    check_int("trainer.max_steps", max_steps)
    check_int("trainer.val_check_interval", val_check_interval)
    check_int("trainer.accumulate_grad_batches", accumulate_grad_batches)
    check_int("trainer.log_every_n_steps", log_every_n_steps)
    precision = resolve_precision(precision, accelerator)
    if "bf16" in str(precision) and not supports_bfloat16(accelerator):
        rank_zero_warn(
            f"precision={precision}: this device only emulates bfloat16, many times slower than float32; "
            "use precision=32-true."
        )
    plugins = list(settings.pop("plugins", None) or [])
    plugins.append(AtomicCheckpointIO())
    if precision in MIXED and accelerator in ("cpu", "gpu"):
        device = "cpu" if accelerator == "cpu" else "cuda" if torch.cuda.is_available() else "mps"
        plugins.append(FusedMixedPrecision(precision, device))  # type: ignore[arg-type]
    # Lightning's dry run validates at its end anyway
    interval = [] if settings.get("fast_dev_run") else [ValidationInterval(min(val_check_interval, max_steps))]
    measured = [] if settings.get("deterministic") or settings.get("benchmark") is not None else [CudnnBenchmark()]
    try:
        trainer = Trainer(
            accelerator=accelerator,
            max_steps=max_steps,
            val_check_interval=val_check_interval,  # in batches; `ValidationInterval` makes it steps
            check_val_every_n_epoch=None,
            accumulate_grad_batches=accumulate_grad_batches,
            precision=None if any(isinstance(plugin, Precision) for plugin in plugins) else precision,  # type: ignore[arg-type]
            log_every_n_steps=min(log_every_n_steps, max_steps),
            # first, so that a bad loss is known and weights are float32 again before others validate or export them
            callbacks=[
                NonFiniteLoss(nan_loss),
                CastFrozenWeights(),
                EndWithLostRank(),
                *measured,
                *callbacks,
                *interval,
            ],
            enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
            enable_progress_bar=any(isinstance(callback, ProgressBar) for callback in callbacks),
            enable_model_summary=False,
            num_sanity_val_steps=0,
            plugins=plugins,
            **settings,
        )
    except SettingsError:
        raise
    except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
        raise SettingsError(f"trainer: Lightning refuses these settings: {' '.join(str(error).split())}") from error
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > 1 and trainer.world_size == 1:  # each of them would do the whole work, in one folder
        raise SettingsError(
            f"trainer.strategy={settings.get('strategy')}: torchrun started {started} processes, and each would train "
            "alone; add trainer.strategy=ddp and trainer.devices, or trainer=ddp."
        )
    return trainer


def resolve_precision(precision: str | None, accelerator: str) -> str:
    """Lightning's name of a precision.

    ``auto`` is bf16-mixed if the device computes in bfloat16, else 16-mixed on a GPU and 32-true on a CPU.
    ``auto-true``, for sampling, is 16-true on a GPU of NVIDIA or AMD: as fast as bf16-true there, and nearer to
    float32. Elsewhere it is bf16-true if the device computes in it, else 32-true. None is ``auto`` on such a GPU, and
    else 32-true.
    """
    cuda = accelerator == "gpu" and torch.cuda.is_available()
    if precision is None:
        precision = "auto" if cuda else "32-true"
    if precision == "auto":
        return BF16_MIXED if supports_bfloat16(accelerator) else "16-mixed" if cuda else "32-true"
    if precision == "auto-true":
        return "16-true" if cuda else "bf16-true" if supports_bfloat16(accelerator) else "32-true"
    if str(precision) in ("16", "bf16"):  # the names of Lightning 1
        precision = f"{precision}-mixed"
    if precision == "16-mixed" and accelerator == "cpu":
        rank_zero_warn(f"precision=16-mixed: not available on CPU; using {BF16_MIXED}.")
        return BF16_MIXED
    return precision


def supports_bfloat16(accelerator: str) -> bool:
    """Whether the device multiplies in bfloat16 natively; most x86 CPUs from before 2022 convert every value."""
    if accelerator == "gpu":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # from torch 2.10 on
    return capabilities.get("architecture") != "x86_64" or capabilities["avx512_bf16"]
