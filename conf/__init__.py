"""The Hydra tree of sdmodule, importable as ``pkg://sdmodule.conf``."""

from omegaconf import OmegaConf

from sdmodule.components import ASSETS

# ${asset:emoji}: a folder that comes with the package
OmegaConf.register_new_resolver("asset", lambda name: str(ASSETS / name), replace=True)
