"""The command to type next, as the shell that started this one would run it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from sdmodule.components.folder_kinds import SINGLE_FILE

BASE_KEYS = ("pretrained", "revision", "variant")
"""Settings that name the checkpoint which an adapter or another part of a model belongs to."""


def command_line(command: str, *arguments: str) -> str:
    """A command line in the words that started this process: its interpreter and script, or its entry point.

    Args:
        command: ``train``, ``predict`` or ``evaluate``.
        arguments: its settings, not quoted yet.
    """
    return shlex.join([*_words(command), *arguments])


def _words(command: str) -> list[str]:
    started = Path(sys.argv[0])
    if started.name in ("train.py", "predict.py") and command == "evaluate":
        return [sys.orig_argv[0], "-m", "sdmodule.evaluate"]
    if started.name in ("train.py", "predict.py"):
        return [sys.orig_argv[0], str(started.with_name(f"{command}.py"))]
    script = started.with_name(f"sdmodule-{command}")
    found = shutil.which(script.name)
    if not script.is_file() or (found is not None and os.path.samefile(found, script)):
        return [script.name]
    return [str(script)]


def next_line(cfg: DictConfig, model: Any, data: Any, export: Path, caption: str) -> str:
    """What to do with what a training has exported, and the command for it; arguments as of `sampling_settings`."""
    if _kind(model) == "contrastive":
        return f"Score images with it: {command_line('evaluate', 'run=FOLDER', f'scorer={export}')}"
    return f"Sample with it: {command_line('predict', *sampling_settings(cfg, model, data, export, caption))}"


def sampling_settings(cfg: DictConfig, model: Any, data: Any, export: Path, caption: str) -> list[str]:
    """Settings of ``predict`` that sample with what a training has exported.

    Args:
        cfg: configuration of the training.
        model: what was trained.
        data: the data module, which has an image to inpaint or to follow.
        export: folder of the export.
        caption: a caption of the data.
    """
    settings = list(_model_settings(cfg, model, export))
    if getattr(model, "task", "") == "inpaint":
        settings += ["model=inpaint", *_image_to_inpaint(data)]
    elif (size := getattr(data, "size", None)) and tuple(size) != (model.resolution,) * 2:
        settings += [f"height={size[0]}", f"width={size[1]}"]
    if _kind(model) == "controlnet":
        settings += _image_to_follow(data)
    return [*settings, f"prompt={caption}"]


def _kind(model: Any) -> str:
    return model.tuning.kind if hasattr(model, "tuning") else getattr(model, "kind", "autoencoder")


def _model_settings(cfg: DictConfig, model: Any, export: Path) -> Iterator[str]:
    """The checkpoint, and what was trained beside it; a model that was trained as a whole is its own checkpoint."""
    kind = _kind(model)
    if kind == "full":
        whole = export / SINGLE_FILE
        yield f"pretrained={whole if whole.is_file() else export}"
        return
    yield from (f"{key}={cfg[key]}" for key in BASE_KEYS if cfg[key] is not None and cfg[key] != "tiny")
    places = {name: place for name, place in cfg.components.items() if place is not None}
    if kind == "autoencoder":
        alone = export / "vae.safetensors"
        places["vae"] = str(alone if alone.is_file() else export / "vae")
    yield from (f"components.{name}={place}" for name, place in places.items())
    if kind == "controlnet":
        yield f"controlnet={export}"
    elif kind != "autoencoder":
        yield f"adapters=[{{path: {_in_hydra(str(export))}}}]"


def _in_hydra(path: str) -> str:
    """A path within settings in braces, in quotes if Hydra would not read it."""
    if re.fullmatch(r"[\w./-]+", path):
        return path
    escaped = path.replace('"', r"\"")
    return f'"{escaped}"'


def _first_example(data: Any) -> Any:
    """The first training image that is a file; None if there is none."""
    examples: Any = getattr(getattr(data, "train_set", None), "examples", ())
    return examples[0] if len(examples) and isinstance(examples[0].path, Path) else None


def _from_here(file: Path) -> str:
    """A path as one would type it: relative if the file is in the current folder."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def _image_to_inpaint(data: Any) -> list[str]:
    """A training image, masked in the middle."""
    from sdmodule.io.image_files import upright_size

    if (example := _first_example(data)) is None:
        return ["image=photo.png", "mask=mask.png"]
    width, height = upright_size(example.path)
    box = f"{width // 4},{height // 4},{width * 3 // 4},{height * 3 // 4}"
    return [f"image={_from_here(example.path)}", f"mask=[{box}]"]


def _image_to_follow(data: Any) -> list[str]:
    """The control image of a training image, or that image and its edges."""
    example = _first_example(data)
    if example is not None and isinstance(example.control, Path):
        return [f"control={_from_here(example.control)}"]
    return [f"control={'photo.png' if example is None else _from_here(example.path)}", "control_edges=true"]
