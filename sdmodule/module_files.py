"""What of a model is kept in files: what is trained, in checkpoints and in exports."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning import LightningModule

from sdmodule.components.inpaint_unet import convert_to_inpaint, is_inpaint_unet
from sdmodule.errors import SettingsError
from sdmodule.training.checkpoint_io import check_weights
from sdmodule.training.optimizers import check_state, name_optimizers

if TYPE_CHECKING:
    from sdmodule.module import StableDiffusionModule


def save_pretrained(module: StableDiffusionModule, folder: str | Path, dtype: str = "float32") -> None:
    """Write what is trained, its weights as ``dtype``: a folder that diffusers' pipeline loads, or an adapter."""
    if module.adapters and not module.hparams["merge_adapters"]:
        raise SettingsError("adapters stand beside the weights; set merge_adapters=true to write them together.")
    with module.full_precision_weights():
        module.tuning.export(module.parts, folder, dtype)


def on_save_checkpoint(module: StableDiffusionModule, checkpoint: dict[str, Any]) -> None:
    """Keep what is trained; the frozen parts are in the base model, whose identity is kept instead."""
    kept = {name for name, value in module.named_parameters() if value.requires_grad}
    checkpoint["state_dict"] = {name: v for name, v in checkpoint["state_dict"].items() if name in kept}
    module.base_model.save(checkpoint)
    name_optimizers(checkpoint, module._trainer)


def on_load_checkpoint(module: StableDiffusionModule, checkpoint: dict[str, Any]) -> None:
    """Check, before anything is loaded, that a checkpoint is of this base model and of what is trained here."""
    module.base_model.check(checkpoint)
    if module.holes.convert and not is_inpaint_unet(
        module.unet
    ):  # loaded without a trainer, which would have set it up
        convert_to_inpaint(module.unet)
    check_weights(checkpoint["state_dict"], module)
    check_state(checkpoint, module.optimizer, module.lr_scheduler, module.parameter_groups, module._trainer)


def load_state_dict(
    module: StableDiffusionModule, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
) -> Any:
    """Lightning tells of all that a checkpoint misses: frozen weights are no part of one."""
    found = LightningModule.load_state_dict(module, state_dict, strict, assign)
    trained = {name for name, value in module.named_parameters() if value.requires_grad}
    found.missing_keys[:] = [name for name in found.missing_keys if name in trained]
    return found
