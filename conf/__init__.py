"""The Hydra tree of sdmodule, importable as ``pkg://sdmodule.conf``; imports neither torch nor diffusers."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from sdmodule.errors import SettingsError

SAMPLERS = {
    "ddim": "Song et al. 2021; the same seed gives the same image, in few steps or in many",
    "ddpm": "Ho et al. 2020; adds noise at every step, best with hundreds of steps",
    "dpmpp_2m": "DPM-Solver++ (Lu et al. 2022); good images in 20 to 30 steps",
    "dpmpp_2m_karras": "DPM-Solver++ on the noise levels of Karras et al. 2022",
    "euler": "Karras et al. 2022, first order",
    "euler_a": "Euler's method with fresh noise at every step",
    "heun": "Karras et al. 2022, second order: two UNet calls per step",
    "lms": "linear multistep",
    "pndm": "Liu et al. 2022; the default of Stable Diffusion v1",
    "unipc": "Zhao et al. 2023; good images in 10 to 20 steps",
}
"""Options of the group ``sampler`` that change nothing but the scheduler of ``sampler/checkpoint.yaml``."""


def asset(name: str) -> str:
    """Path of a folder that ships with the package: ``${asset:emoji}``. Found without importing torch."""
    package = find_spec("sdmodule")
    assert package is not None and package.origin is not None
    return str(Path(package.origin).parent / "components" / "assets" / name)


def given(key: str, default: Any = None, *, _root_: DictConfig) -> Any:
    """A key's value, or a default where there is no such key: ``${given:steps,50}``.

    Unlike ``oc.select`` it does not take the default for a key that must be given (``???``), nor for that text.

    Raises:
        MissingMandatoryValue: if the key must be given.
    """
    parent, _, name = key.rpartition(".")
    holder = OmegaConf.select(_root_, parent) if parent else _root_
    if not isinstance(holder, DictConfig) or name not in holder.keys():  # "in" is False for ???
        return default
    if OmegaConf.is_missing(holder, name):
        raise MissingMandatoryValue(f"Missing mandatory value: {key}")
    return holder.get(name)


def merging(tome: Mapping[str, Any] | None, tomesd_cfg: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Settings of token merging under either name: ``${merging:${tome},${tomesd_cfg}}``.

    Raises:
        SettingsError: if both are given, or the other name is given something else.
    """
    if tomesd_cfg and not isinstance(tomesd_cfg, Mapping):
        raise SettingsError(f"tomesd_cfg={tomesd_cfg}: must be settings, in quotes: 'tomesd_cfg={{ratio: 0.5}}'.")
    if tomesd_cfg and tome and tome["ratio"]:
        raise SettingsError(f"tomesd_cfg={tomesd_cfg}: tome.ratio={tome['ratio']} is given too; give one of them.")
    return tomesd_cfg or tome


OmegaConf.register_new_resolver("asset", asset, replace=True)
OmegaConf.register_new_resolver("given", given, replace=True)
OmegaConf.register_new_resolver("merging", merging, replace=True)
for _name in SAMPLERS:
    _node = {"defaults": ["checkpoint", "_self_"], "scheduler": _name}
    ConfigStore.instance().store(group="sampler", name=_name, node=_node, provider="sdmodule.conf")
