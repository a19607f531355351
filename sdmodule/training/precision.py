"""The precision that a model can be trained in, and clipping in mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from typing_extensions import override

from sdmodule.errors import SettingsError


def check_training_precision(trainer: Trainer | None) -> None:
    """Check that a trainer keeps weights and images in float32.

    Raises:
        SettingsError: if it does not.
    """
    precision = "" if trainer is None else str(trainer.precision)
    if precision.endswith("-true") and precision != "32-true":
        raise SettingsError(
            f"trainer.precision={precision}: is for sampling only; train with 32-true, bf16-mixed, 16-mixed or auto."
        )


class FusedMixedPrecision(MixedPrecision):
    """Mixed precision in which gradients can be clipped with a fused optimizer too.

    Lightning refuses this, because a fused optimizer can unscale float16 gradients itself, after they are clipped.
    Here they are unscaled before, and the optimizer is only told which steps to skip, on the device: with another
    optimizer the CPU waits for the GPU to know that. bfloat16 gradients are never scaled.

    Args:
        precision: ``bf16-mixed`` or ``16-mixed``.
        device: ``cpu``, ``cuda`` or ``mps``.
    """

    def __init__(self, precision: Literal["16-mixed", "bf16-mixed"], device: str) -> None:
        super().__init__(precision, device)

    @override
    def optimizer_step(  # type: ignore[override]  # as in the class above
        self, optimizer: Any, model: LightningModule, closure: Callable[[], Any], **kwargs: Any
    ) -> Any:
        scaler = self.scaler
        if scaler is None or not updates_on_device(optimizer):
            return super().optimizer_step(optimizer, model, closure, **kwargs)

        def unscaled() -> Any:
            loss = closure()
            if loss is not None:
                scaler.unscale_(optimizer)
            return loss

        return super().optimizer_step(optimizer, model, unscaled, **kwargs)

    @override
    def clip_gradients(self, *arguments: Any, **options: Any) -> None:
        Precision.clip_gradients(self, *arguments, **options)

    @override
    def clip_grad_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        """Clip gradients as `torch.nn.utils.clip_grad_norm_` does, but on CPU skip the multiplication by 1."""
        weights = list(self.main_params(optimizer))
        norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if norm.device.type == "cpu" and norm + 1e-6 <= clip_val:
            return
        clip_grads_with_norm_(weights, clip_val, norm)


def updates_on_device(optimizer: Any) -> bool:
    """Whether an optimizer skips a step if a tensor on the device, its ``found_inf``, says so: a fused one."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def allows_fused(trainer: Trainer | None) -> bool:
    """Whether a trainer can clip the gradients of a fused optimizer; Lightning's own ``16-mixed`` cannot."""
    if trainer is None or str(trainer.precision) != "16-mixed":
        return True
    return isinstance(trainer.precision_plugin, FusedMixedPrecision)
