"""The Lightning trainer, with the machine and its own settings checked first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from sdmodule.callbacks.finite_loss import STOP, NonFiniteLoss
from sdmodule.callbacks.frozen_weights import CastFrozenWeights
from sdmodule.callbacks.validation_interval import ValidationInterval
from sdmodule.errors import SettingsError
from sdmodule.ranges import check_whole
from sdmodule.training.checkpoint_io import AtomicCheckpointIO

BF16_MIXED: Final = "bf16-mixed"


def make_trainer(
    accelerator: str = "cpu",
    max_steps: int = 1000,
    val_check_interval: int = 250,
    accumulate_grad_batches: int = 1,
    precision: str = "32-true",
    log_every_n_steps: int = 10,
    nan_loss: str = STOP,
    callbacks: Sequence[Callback] = (),
    **settings: Any,
) -> Trainer:
    """Build a trainer.

    Args:
        accelerator: ``cpu`` or ``gpu``.
        max_steps: optimizer steps of the training.
        val_check_interval: optimizer steps between validations, counted over epochs; a shorter training validates
            once, at its end.
        accumulate_grad_batches: batches that make a step.
        precision: one of Lightning's; or ``auto``: bf16-mixed where the device computes in bfloat16, else 32-true; or
            ``auto-true``, to sample: bf16-true there, 16-true on a GPU that does not, else 32-true.
        log_every_n_steps: optimizer steps between rows of the training's figures.
        nan_loss: what becomes of a step whose loss is no number: ``stop`` or ``skip``.
        callbacks: what goes along; a progress bar and checkpoints are made by these alone.
        settings: any others of ``lightning.Trainer``.

    Raises:
        SettingsError: for a GPU where there is none, and for settings that Lightning refuses.
    """
    if accelerator == "gpu" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise SettingsError("trainer=gpu needs a GPU and torch sees none on this machine; use trainer=cpu.")
    check_whole("trainer.max_steps", max_steps)
    check_whole("trainer.val_check_interval", val_check_interval)
    check_whole("trainer.accumulate_grad_batches", accumulate_grad_batches)
    check_whole("trainer.log_every_n_steps", log_every_n_steps)
    precision = resolve_precision(precision, accelerator)
    if "bf16" in str(precision) and not supports_bfloat16(accelerator):
        rank_zero_warn(
            f"precision={precision}: this device emulates bfloat16, many times slower than float32; "
            "precision=32-true is faster here."
        )
    plugins = list(settings.pop("plugins", None) or [])
    strategy = str(settings.get("strategy"))
    if "deepspeed" not in strategy:  # which writes checkpoints of its own kind
        plugins.append(AtomicCheckpointIO())
    own = "deepspeed" in strategy or "fsdp" in strategy  # these bring a precision of their own kind
    if precision == BF16_MIXED and accelerator in ("cpu", "gpu") and not own:
        plugins.append(BFloat16Mixed("cpu" if accelerator == "cpu" else "cuda" if torch.cuda.is_available() else "mps"))
    # a dry run validates at its end by itself
    interval = [] if settings.get("fast_dev_run") else [ValidationInterval(min(val_check_interval, max_steps))]
    try:
        return Trainer(
            accelerator=accelerator,
            max_steps=max_steps,
            val_check_interval=val_check_interval,  # of batches, until `ValidationInterval` says when
            check_val_every_n_epoch=None,
            accumulate_grad_batches=accumulate_grad_batches,
            precision=None if any(isinstance(one, Precision) for one in plugins) else precision,  # type: ignore[arg-type]
            log_every_n_steps=min(log_every_n_steps, max_steps),
            # weights are whole again before any other callback validates or exports them
            callbacks=[CastFrozenWeights(), *callbacks, *interval, NonFiniteLoss(nan_loss)],
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


def check_training_precision(trainer: Trainer | None) -> None:
    """Check that a trainer leaves the weights that it trains, and the images, in float32.

    Raises:
        SettingsError: if not.
    """
    precision = "" if trainer is None else str(trainer.precision)
    if precision.endswith("-true") and precision != "32-true":
        raise SettingsError(
            f"trainer.precision={precision} is for sampling; train with 32-true, bf16-mixed, 16-mixed or auto."
        )


def resolve_precision(precision: str, accelerator: str) -> str:
    """A precision under the name that Lightning has for it; what ``auto`` and ``auto-true`` are on a device."""
    if precision == "auto":
        return BF16_MIXED if supports_bfloat16(accelerator) else "32-true"
    if precision == "auto-true":
        return "bf16-true" if supports_bfloat16(accelerator) else "16-true" if accelerator == "gpu" else "32-true"
    if str(precision) in ("16", "bf16"):  # as older releases of Lightning named them
        precision = f"{precision}-mixed"
    if precision == "16-mixed" and accelerator == "cpu":
        rank_zero_warn(f"precision=16-mixed: a processor has none; {BF16_MIXED} is taken.")
        return BF16_MIXED
    return precision


class BFloat16Mixed(MixedPrecision):
    """``bf16-mixed``, with gradients that can be clipped whatever the optimizer.

    Lightning refuses to clip those of a fused optimizer in any mixed precision, since it would scale float16's back
    itself. Those of bfloat16 are never scaled.

    Args:
        device: ``cpu``, ``cuda`` or ``mps``.
    """

    def __init__(self, device: str) -> None:
        super().__init__(BF16_MIXED, device)

    @override
    def clip_gradients(self, *arguments: Any, **options: Any) -> None:
        Precision.clip_gradients(self, *arguments, **options)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Scale gradients to a norm, as torch does, but not by 1 where to ask costs nothing."""
        weights = list(self.main_params(optimizer))
        norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if norm.device.type == "cpu" and norm + 1e-6 <= clip_val:
            return
        clip_grads_with_norm_(weights, clip_val, norm)


def supports_bfloat16(accelerator: str) -> bool:
    """Whether the device multiplies in bfloat16 itself; most x86 processors before 2022 convert each number."""
    if accelerator == "gpu":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # torch before 2.10 does not tell
    return capabilities.get("architecture") != "x86_64" or capabilities["avx512_bf16"]
