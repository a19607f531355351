"""Metadata in the PNG text of an image: written, read, and turned into the settings that reproduce the image."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdmodule.errors import SettingsError, choices, is_int, is_number
from sdmodule.io.atomic import atomic_write
from sdmodule.io.image_files import open_image


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_bool(value: object) -> bool:
    return isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return is_int(value) and value >= 0


def _is_setting(value: object) -> bool:
    """Whether a value is plain or a list of plain values: no mapping, so that it cannot instantiate anything."""
    if isinstance(value, list):
        return all(_is_setting(item) and not isinstance(item, list) for item in value)
    return value is None or _is_text(value) or _is_bool(value) or is_number(value)


def _is_settings(value: object) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch(r"[a-z][a-z0-9_]*", name) and _is_setting(item) for name, item in value.items()
    )


def _is_adapters(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and one.keys() == {"path", "scale"} and _is_text(one["path"]) and is_number(one["scale"])
        for one in value
    )


def _is_each(value: object) -> bool:
    """Whether a value is a number, or a list with one for each ControlNet."""
    return is_number(value) or (isinstance(value, list) and all(map(is_number, value)))


def _is_text_or_texts(value: object) -> bool:
    """Whether a value is a text, or a list with one for each ControlNet."""
    return _is_text(value) or (isinstance(value, list) and len(value) > 1 and all(map(_is_text, value)))


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


SIZES = [f"{sign}{name}" for sign in ("", "negative_") for name in ("original_size", "crop_top_left", "target_size")]
"""What Stable Diffusion XL was told of sizes."""

FIELDS: dict[str, Callable[[object], bool]] = {
    "index": _is_count,
    "prompt": _is_text,
    "negative_prompt": _is_text,
    "prompt_2": _is_text,
    "negative_prompt_2": _is_text,
    "seed": _is_count,
    "image": _is_text,
    "mask": _is_text,
    "control": _is_text_or_texts,
    "control_scale": _is_each,
    "control_guidance_start": _is_each,
    "control_guidance_end": _is_each,
    "guess_mode": _is_bool,
    "steps": _is_count,
    "guidance_scale": is_number,
    "guidance_rescale": is_number,
    "eta": is_number,
    "scheduler": _is_text,
    "scheduler_settings": _is_settings,
    "height": _is_count,
    "width": _is_count,
    "model": _is_text,
    "family": _is_text,
    "revision": _is_text,
    "variant": _is_text,
    "components": _is_settings,
    "adapters": _is_adapters,
    "merge_adapters": _is_bool,
    "controlnet": _is_text_or_texts,
    "precision": _is_text,
    "tome": _is_settings,
    "speed": _is_settings,
    "timesteps": _is_setting,
    "sigmas": _is_setting,
    "denoising_start": is_number,
    "denoising_end": is_number,
    "clip_skip": _is_count,
    "freeu": _is_settings,
    "hires": is_number,
    "hires_strength": is_number,
    "hires_upscale": _is_text,
    "refiner": _is_text,
    "ip_adapter": _is_text,
    "ip_adapter_image": _is_text_or_texts,
    "ip_adapter_scale": is_number,
    "image_encoder": _is_text,
    "refiner_start": is_number,
    **dict.fromkeys(SIZES, _is_pair),
    "task": _is_text,
    "inpaint": _is_text,
    "strength": is_number,
    "mask_blur": is_number,
    "only_masked": _is_bool,
    "padding": _is_count,
    "batch_size": _is_count,
    "batch_row": _is_count,
    "device": _is_text,
    "software": _is_text,
    "seconds": is_number,
}
"""Metadata fields with the check of each one's type; other entries of a PNG's text are ignored."""

REQUIRED = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "scheduler", "model")
"""Fields that every image of predict has."""

KEYS = {
    **{name: name for name in ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "height", "width")},
    **{name: name for name in ("revision", "variant", "precision", "batch_size")},
    **{name: name for name in ("adapters", "merge_adapters", "controlnet", "control_scale")},
    **{name: name for name in ("strength", "mask_blur", "only_masked", "padding")},
    **{name: name for name in ("prompt_2", "negative_prompt_2", "clip_skip", "hires", "hires_strength")},
    **{name: name for name in ("refiner", "refiner_start", "ip_adapter", "ip_adapter_scale")},
    **{name: f"sampler.{name}" for name in ("guidance_rescale", "eta", "timesteps", "sigmas", "freeu", *SIZES)},
    **{name: f"sampler.{name}" for name in ("hires_upscale", "guess_mode", "denoising_start", "denoising_end")},
    **{name: f"sampler.{name}" for name in ("control_guidance_start", "control_guidance_end")},
    "image_encoder": "components.image_encoder",
    "model": "pretrained",
    "batch_row": "data.batch_row",
}
"""Fields of a single value, with their keys in the configuration of predict."""


INVALID = object()
"""What stands for metadata of a wrong type."""


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write an image as PNG, atomically, with its metadata as PNG text."""
    text = PngInfo()
    for name, value in metadata.items():
        text.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    with atomic_write(path) as aside:
        image.save(aside, format="PNG", pnginfo=text)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata in an image's PNG text, with their types checked.

    The text is untrusted: unknown fields are left out, and nothing in it is instantiated or run.

    Raises:
        SettingsError: if the file is not an intact PNG, or lacks the metadata that predict writes.
    """
    try:
        with open_image(Path(path).expanduser(), formats=("PNG",)) as file:
            file.load()
            text = dict(file.text)  # type: ignore[attr-defined]
    except FileNotFoundError as error:
        raise SettingsError(f"from={path}: not found; give an image that predict wrote.") from error
    except Exception as error:  # a damaged file ends in many kinds
        raise SettingsError(f"from={path}: is not an intact PNG ({error}); give one that predict wrote.") from error
    return parse_metadata(text, path)


def parse_metadata(text: Mapping[str, str], path: str | Path) -> dict[str, Any]:
    """The metadata in an image's PNG text, in the order in which they were written.

    Args:
        text: of the image, by name.
        path: the image, for messages.

    Raises:
        SettingsError: if it lacks the metadata that predict writes, or one of them is of another type.
    """
    if missing := [name for name in REQUIRED if name not in text]:
        raise SettingsError(
            f"from={path}: has no metadata of predict (no {choices(missing)} in its PNG text); give an unchanged PNG "
            "that predict wrote."
        )
    metadata = {name: _parse(str(value), name) for name, value in text.items() if name in FIELDS}
    if invalid := [name for name, value in metadata.items() if value is INVALID]:
        name, value = invalid[0], text[invalid[0]]
        raise SettingsError(f"from={path}: has the invalid {name}={value[:80]!r} in its PNG text; give another image.")
    return metadata


@lru_cache(1024)  # the images of a run share most of their metadata
def _parse(text: str, name: str) -> Any:
    if FIELDS[name] is _is_text:
        return text
    if FIELDS[name] is _is_text_or_texts and not text.startswith('["'):
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return INVALID
    return value if FIELDS[name](value) else INVALID


def settings_from_png(path: str | Path) -> dict[str, Any]:
    """The settings of predict, by configuration key, that reproduce an image.

    Args:
        path: an image that predict wrote; input images are taken from the ``inputs/`` of its run folder.

    Raises:
        SettingsError: if its metadata cannot be read.
    """
    metadata = read_metadata(path)
    settings = {KEYS[name]: value for name, value in metadata.items() if name in KEYS}
    settings["sampler.scheduler"] = {"name": metadata["scheduler"], **metadata.get("scheduler_settings", {})}
    settings |= {f"components.{part}": place for part, place in metadata.get("components", {}).items()}
    settings |= {f"tome.{name}": value for name, value in metadata.get("tome", {"ratio": 0.0}).items()}
    settings |= {f"speed.{name}": value for name, value in metadata.get("speed", {}).items()}
    if "inpaint" in metadata or metadata.get("task") == "image2image":
        settings["model"] = "inpaint" if "inpaint" in metadata else "image2image"
    run = Path(path).expanduser().parent.parent
    for name in ("image", "mask", "control", "ip_adapter_image"):
        if name in metadata and (kept := [_kept_input(run, file) for file in _listed(metadata[name])]) and all(kept):
            settings[name] = kept[0] if len(kept) == 1 else kept
    return settings


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _kept_input(run: Path, name: str) -> str | None:
    """Path of an input image in a run folder; None if it is not there, or if the name is none of such an image."""
    found = re.fullmatch(r"inputs/[0-9a-f]{16}\.png", name) and (run / name).is_file()
    return str(run / name) if found else None
