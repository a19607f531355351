"""How an image was made: written into its PNG text, read from it, and turned into settings that make it again."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sdmodule.errors import SettingsError, choices
from sdmodule.io.atomic import atomic_write
from sdmodule.io.image_files import open_image


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_setting(value: object) -> bool:
    """A plain value of a part's configuration: no mapping, so that nothing in it can name what is to be built."""
    if isinstance(value, list):
        return all(_is_setting(item) and not isinstance(item, list) for item in value)
    return value is None or _is_text(value) or _is_flag(value) or _is_number(value)


def _is_settings(value: object) -> bool:
    return isinstance(value, dict) and all(
        re.fullmatch(r"[a-z][a-z0-9_]*", name) and _is_setting(item) for name, item in value.items()
    )


def _is_adapters(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and one.keys() == {"path", "scale"} and _is_text(one["path"]) and _is_number(one["scale"])
        for one in value
    )


FIELDS: dict[str, Callable[[object], bool]] = {
    "index": _is_count,
    "prompt": _is_text,
    "negative_prompt": _is_text,
    "seed": _is_count,
    "image": _is_text,
    "mask": _is_text,
    "control": _is_text,
    "control_scale": _is_number,
    "steps": _is_count,
    "guidance_scale": _is_number,
    "guidance_rescale": _is_number,
    "eta": _is_number,
    "scheduler": _is_text,
    "scheduler_settings": _is_settings,
    "height": _is_count,
    "width": _is_count,
    "model": _is_text,
    "revision": _is_text,
    "variant": _is_text,
    "components": _is_settings,
    "adapters": _is_adapters,
    "merge_adapters": _is_flag,
    "controlnet": _is_text,
    "precision": _is_text,
    "tome": _is_settings,
    "speed": _is_settings,
    "inpaint": _is_text,
    "strength": _is_number,
    "mask_blur": _is_number,
    "only_masked": _is_flag,
    "padding": _is_count,
    "batch_size": _is_count,
    "batch_row": _is_count,
    "device": _is_text,
    "software": _is_text,
    "seconds": _is_number,
}
"""What an image's text may tell, and what each of it must be; anything else in a PNG's text is another program's."""

NEEDED = ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "scheduler", "model")
"""Without these an image is not one of ours."""

KEYS = {
    **{name: name for name in ("prompt", "negative_prompt", "seed", "steps", "guidance_scale", "height", "width")},
    **{name: name for name in ("revision", "variant", "precision", "batch_size")},
    **{name: name for name in ("adapters", "merge_adapters", "controlnet", "control_scale")},
    **{name: name for name in ("strength", "mask_blur", "only_masked", "padding")},
    "guidance_rescale": "sampler.guidance_rescale",
    "eta": "sampler.eta",
    "model": "pretrained",
    "batch_row": "data.batch_row",
}
"""Keys of predict's configuration for metadata of one value."""


def save_png(image: Image.Image, path: Path, metadata: Mapping[str, Any]) -> None:
    """Write an image with its metadata as PNG text; no half-written image is ever seen."""
    text = PngInfo()
    for name, value in metadata.items():
        text.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    with atomic_write(path) as aside:
        image.save(aside, format="PNG", pnginfo=text)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What an image's text tells of its making, each of it of the type that it must be.

    The text is data of whoever made the file: what is not known is left out, and nothing in it is ever built or run.

    Raises:
        SettingsError: if the file is no whole PNG, or its text is not that of an image made here.
    """
    try:
        with open_image(Path(path).expanduser(), formats=("PNG",)) as file:
            file.load()
            text = dict(file.text)  # type: ignore[attr-defined]
    except FileNotFoundError as error:
        raise SettingsError(f"from={path} was not found; give the path of an image that predict wrote.") from error
    except Exception as error:  # a damaged file ends in many kinds
        raise SettingsError(f"from={path} cannot be read as a PNG ({error}); give one that predict wrote.") from error
    if missing := [name for name in NEEDED if name not in text]:
        raise SettingsError(
            f"from={path} does not tell how it was made (no {choices(missing)} in its text); give a PNG that predict "
            "wrote, as it wrote it."
        )
    return {name: _parse(text[name], name, path) for name in FIELDS if name in text}


def _parse(text: str, name: str, path: str | Path) -> Any:
    if FIELDS[name] is _is_text:
        return str(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not FIELDS[name](value):
        raise SettingsError(f"from={path} has {name}={text[:80]!r} in its text, which cannot be; give another image.")
    return value


def settings_from_png(path: str | Path) -> dict[str, Any]:
    """The keys of predict's configuration, with the values that make an image again.

    Args:
        path: an image that predict wrote; one that was repainted needs the ``inputs/`` of its run.

    Raises:
        SettingsError: if it does not tell how it was made.
    """
    metadata = read_metadata(path)
    settings = {KEYS[name]: value for name, value in metadata.items() if name in KEYS}
    settings["sampler.scheduler"] = {"name": metadata["scheduler"], **metadata.get("scheduler_settings", {})}
    settings |= {f"components.{part}": place for part, place in metadata.get("components", {}).items()}
    settings |= {f"tome.{name}": value for name, value in metadata.get("tome", {"ratio": 0.0}).items()}
    settings |= {f"speed.{name}": value for name, value in metadata.get("speed", {}).items()}
    if "inpaint" in metadata:
        settings["model"] = "inpaint"
    run = Path(path).expanduser().parent.parent
    for name in ("image", "mask", "control"):
        kept = metadata.get(name, "")
        if re.fullmatch(r"inputs/[0-9a-f]{16}\.png", kept) and (run / kept).is_file():
            settings[name] = str(run / kept)
    return settings
