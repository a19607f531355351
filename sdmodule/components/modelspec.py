"""Metadata in the header of a file of weights, by Stability AI's Model Metadata Standard (modelspec) 1.0.0.

https://github.com/Stability-AI/ModelSpec
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdmodule.components.checkpoint import Components
from sdmodule.components.inpaint_unet import is_inpaint_unet
from sdmodule.components.source import is_single_file
from sdmodule.components.weights_file import Weights

PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v"}
"""What modelspec calls what a UNet predicts."""


def modelspec(parts: Components, weights: Weights, variant: str = "") -> dict[str, str]:
    """Metadata of a file: what it is, without a path of this machine.

    Args:
        parts: the checkpoint.
        weights: of the file, all of one dtype.
        variant: what follows the name of the architecture, such as ``/lora`` for an adapter.
    """
    predicted = parts.scheduler.config.prediction_type
    width, inpainting = parts.unet.config.cross_attention_dim, is_inpaint_unet(parts.unet)
    architecture, implementation = parts.family.architecture(width, inpainting, predicted)
    entries = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}{variant}",
        "implementation": implementation,
        "title": _title(parts.source) or architecture,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hash_sha256": f"0x{tensors_hash(weights)}",
        "resolution": f"{parts.resolution}x{parts.resolution}",
        "prediction_type": PREDICTION_TYPES.get(predicted, predicted),
    }
    return {f"modelspec.{name}": value for name, value in entries.items()}


def _title(source: str) -> str:
    """The last name in a path or hub id that is not that of every export."""
    names = Path(source).with_suffix("" if is_single_file(source) else Path(source).suffix).parts
    return next((name for name in reversed(names) if name not in ("export", "model", "~", "/", "..")), "")


def tensors_hash(weights: Weights) -> str:
    """SHA-256 of a safetensors file without its header, for tensors of one dtype: they lie in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(_bytes(weights[name]))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    return value.reshape(-1).view(torch.uint8).numpy().data
