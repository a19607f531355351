"""The presets of ``speed=``, composed as on the command line."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from sdmodule.cli.trainer import resolve_precision

GROUPS = ("sampling", "tome", "speed")
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def preset(name: str, *overrides: str) -> dict[str, Any]:
    """The settings groups that ``python predict.py speed=NAME …`` passes to ``StableDiffusionModule``."""
    model = OmegaConf.to_container(_compose(name, *overrides).model, resolve=True)
    assert isinstance(model, dict)
    return {key: model[key] for key in GROUPS}


def dtype(name: str, accelerator: str = "cpu", *overrides: str) -> torch.dtype:
    """The dtype of the weights with ``python predict.py speed=NAME …``, on a ``cpu`` or ``gpu``."""
    return DTYPES[resolve_precision(_compose(name, *overrides).trainer.precision, accelerator)]


@cache
def _compose(name: str, *overrides: str) -> DictConfig:
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        return compose("predict", ["prompt=", f"speed={name}", *overrides])
