"""What is installed: the answer to ``sdmodule``, ``python -m sdmodule`` and ``--version``."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata, resources
from pathlib import Path

from sdmodule import __version__

ROOT = Path(__file__).parents[2]
"""The clone, if the package was not installed from a wheel."""


def main() -> None:
    """Entry point of ``sdmodule`` and of ``python -m sdmodule``."""
    given = sys.argv[1:]
    if unknown := [word for word in given if word not in ("--version", "--help", "-h")]:
        told = " ".join(unknown)
        print(
            f"error: {told}: sdmodule takes --version only; to sample or to train, type {command('predict')} or "
            f"{command('train')}.",
            file=sys.stderr,
        )
        sys.exit(1)
    try:
        print(version_line() if "--version" in given else about(), flush=True)
    except BrokenPipeError:  # whoever read the output has stopped, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def version_line() -> str:
    """Versions of the package and of what it is built on, in one line; imports none of it."""
    versions = (f"{name} {metadata.version(name)}" for name in ("torch", "lightning", "diffusers"))
    return ", ".join([f"sdmodule {__version__}", *versions])


def about() -> str:
    """Versions, devices, embedded models, commands and docs, on about twenty lines."""
    found, models = "\n  ".join(devices()), ", ".join(embedded_models())
    predict, train = command("predict"), command("train")
    docs = f"{shortest(ROOT / 'README.md')} and {shortest(ROOT / 'docs')}" if is_clone() else "README.md and docs/"
    return f"""\
Stable Diffusion as a LightningModule with a Hydra configuration: fine-tune it, sample it.

Versions
  {version_line()}, Python {platform.python_version()}
Devices
  {found}
Embedded models, for pretrained=…
  {models}
Commands
  {predict} prompt="a red circle on a blue background"
  {train} experiment=demo
  {predict} --help   # all keys; also --help sampler, --cfg job, --version
Python
  from sdmodule import StableDiffusionModule
  sd = StableDiffusionModule.from_pretrained("tiny")
  sd.infer("a red circle on a blue background")["samples"][0].save("circle.png")
Docs
  {docs}{"; make docs builds the site" if is_clone() else " in the repository"}"""


def is_clone() -> bool:
    """Whether the package is used from a clone of the repository."""
    return (ROOT / "predict.py").is_file() and (ROOT / "conf" / "predict.yaml").is_file()


def command(name: str) -> str:
    """The command ``predict`` or ``train`` as it can be typed in the current folder.

    Args:
        name: ``predict`` or ``train``.
    """
    script, installed = ROOT / f"{name}.py", f"sdmodule-{name}"
    if is_clone():
        return f"{python()} {shortest(script)}"
    if shutil.which(installed):
        return installed
    return shortest(Path(sys.executable).with_name(installed))


def python() -> str:
    """The running Python as it can be typed: ``python`` where that is it, else its path."""
    found = shutil.which("python")
    running = Path(sys.executable).parent / "python"
    return "python" if found and Path(found) in (running, Path(sys.executable)) else shortest(Path(sys.executable))


def shortest(path: Path) -> str:
    """A path as it can be typed in the current folder."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


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
