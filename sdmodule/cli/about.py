"""What is installed: the answer to ``--version`` and to ``python -m sdmodule``."""

from __future__ import annotations

import platform
from importlib import metadata, resources

from sdmodule import __version__


def version_line() -> str:
    """Versions of the package and of what it is built on, in one line; imports none of it."""
    versions = (f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "diffusers"))
    return ", ".join([f"sdmodule {__version__}", *versions])


def about() -> str:
    """Versions, devices, embedded models, commands and docs, on about twenty lines."""
    found, models = "\n  ".join(devices()), ", ".join(embedded_models())
    return f"""\
Stable Diffusion as a LightningModule with a Hydra configuration: fine-tune it, sample it.

Versions
  {version_line()}, Python {platform.python_version()}

Devices
  {found}

Embedded models, for pretrained=…
  {models}

Commands
  sdmodule-predict prompt="a red circle on a blue background"   # samples images; python predict.py in the repository
  sdmodule-train data.root=FOLDER                               # fine-tunes; python train.py in the repository
  --help lists all settings, --cfg job those of a run, --version the versions.

Python
  from sdmodule import StableDiffusionModule
  StableDiffusionModule.from_pretrained("tiny").infer("a red circle on a blue background")["samples"][0].save("circle.png")

Docs
  README.md and docs/ in the repository; make docs builds the site."""


def devices() -> list[str]:
    """One line per device that torch can use."""
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(f"cuda:{index} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)")
    if torch.backends.mps.is_available():
        found.append("mps")
    return found


def embedded_models() -> list[str]:
    """Names of the models that ship with the package."""
    assets = resources.files("sdmodule.components.assets")
    return sorted(folder.name for folder in assets.iterdir() if (folder / "model_index.json").is_file())
