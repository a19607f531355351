"""The Hydra tree of sdmodule, importable as ``pkg://sdmodule.conf``."""

from importlib.util import find_spec
from pathlib import Path

from omegaconf import OmegaConf


def asset(name: str) -> str:
    """Path of a folder that ships with the package: ``${asset:emoji}``. Found without importing torch."""
    package = find_spec("sdmodule")
    assert package is not None and package.origin is not None
    return str(Path(package.origin).parent / "components" / "assets" / name)


OmegaConf.register_new_resolver("asset", asset, replace=True)
