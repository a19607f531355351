"""The presets of ``speed=``, as the command line composes them."""

from __future__ import annotations

from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

SETTINGS = ("sampling", "tome", "speed")


def preset(name: str, *overrides: str) -> dict[str, Any]:
    """What ``python predict.py speed=NAME …`` hands to ``StableDiffusionModule``: its sampling, tome and speed."""
    with initialize_config_module("sdmodule.conf", version_base="1.3"):
        cfg = compose("predict", ["prompt=", f"speed={name}", *overrides])
    model = OmegaConf.to_container(cfg.model, resolve=True)
    assert isinstance(model, dict)
    return {key: model[key] for key in SETTINGS}
