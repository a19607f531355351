"""The presets of ``speed=``, as the command line composes them."""

from __future__ import annotations

from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from sdmodule.cli.trainer import resolve_precision

SETTINGS = ("sampling", "tome", "speed")
DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16}


def preset(name: str, *overrides: str) -> dict[str, Any]:
    """What ``python predict.py speed=NAME …`` hands to ``StableDiffusionModule``: its sampling, tome and speed."""
    model = OmegaConf.to_container(_composed(name, *overrides).model, resolve=True)
    assert isinstance(model, dict)
    return {key: model[key] for key in SETTINGS}


def dtype(name: str) -> torch.dtype:
    """The type that weights have with ``python predict.py speed=NAME`` on a CPU."""
    return DTYPES[resolve_precision(_composed(name).trainer.precision, "cpu")]


def _composed(name: str, *overrides: str) -> DictConfig:
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        return compose("predict", ["prompt=", f"speed={name}", *overrides])
