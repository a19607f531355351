"""Free text on the command line, kept from Hydra's grammar and from OmegaConf's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from sdmodule.errors import SettingsError

FREE_TEXT = (
    *("prompt", "negative_prompt", "image", "mask", "control", "from"),
    *("data.prompt", "data.class_prompt", "data.shards", "data.val_shards"),
    *("tuning.placeholder", "tuning.initializer"),
)
"""Keys whose values are what people write, not expressions of Hydra's."""

PATHS = (
    *("pretrained", "controlnet", "prompts", "ckpt_path", "output_dir", "cache.folder"),
    *("components.unet", "components.vae", "components.text_encoder", "components.tokenizer", "components.scheduler"),
    *("data.root", "data.val_root", "data.class_root", "data.made_in", "callbacks.export.folder"),
    *("data.name", "data.split", "data.val_split", "data.subset", "data.image_column", "data.caption_column"),
)
"""Keys whose values are files and folders, or what a data set calls its parts, which Hydra may read where it can: a
sweep may be over several of them."""

MISSING = "???"
"""What OmegaConf takes for a value that is not given."""


def quote_overrides(arguments: Sequence[str]) -> list[str]:
    """Quote the values of free-text keys, so that they reach the configuration letter for letter.

    A list in brackets stays a list, and ``null`` stays null. Paths that Hydra cannot read are quoted as well.

    Example:
        >>> quoted(["prompt=a cat, (fluffy:1.2)", "steps=20"])
        ["prompt='a cat, (fluffy:1.2)'", 'steps=20']
    """
    return [_quoted(argument) for argument in _options_first(arguments)]


WITH_A_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    "--experimental-rerun",
)
"""Options of Hydra's that are followed by their value."""


def _options_first(arguments: Sequence[str]) -> list[str]:
    """Options such as ``-m`` before all settings: Hydra's parser takes settings in one place alone."""
    options: list[str] = []
    settings: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_setting = before not in WITH_A_VALUE and re.match(r"[^-=][^=]*=|~", argument)
        (settings if is_setting else options).append(argument)
    return options + settings


def _quoted(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals:
        return argument
    if key.lstrip("+") in PATHS and not _is_path(argument):
        return f"{key}={_in_quotes(value)}"
    if key.lstrip("+") not in FREE_TEXT or value == "null" or _is_list(value):
        return argument
    return f"{key}={_literal(value)}"


def _is_path(argument: str) -> bool:
    """Whether Hydra's grammar has a meaning for an argument, and it is no number.

    It has none for ``ckpt_path=step=500.ckpt``, and a folder may be called 2024.
    """
    try:
        value = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return False
    return not isinstance(value, (int, float))


def _literal(text: str) -> str:
    """A text in Hydra's grammar, letter for letter whatever it is."""
    if text == MISSING:
        return f"""'${{oc.select:_,"{MISSING}"}}'"""
    # In OmegaConf's grammar a backslash is itself unless it stands before "${".
    return _in_quotes(re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text))


def _in_quotes(text: str) -> str:
    """A text in Hydra's grammar, in which OmegaConf still finds what ``${`` means to it."""
    # In Hydra's grammar a backslash is itself unless it stands before a quote.
    text = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + (r"\'" if match[2] else ""), text)
    return f"'{text}'"


def with_png_settings(arguments: Sequence[str]) -> list[str]:
    """The arguments, quoted, behind the settings of the image that ``from=`` or ``--from`` names.

    A key that is given beside it wins: its setting, or those of its whole group, are not taken from the image.

    Raises:
        SettingsError: if the image does not tell how it was made.
    """
    arguments = _without_option(arguments)
    given = {argument.partition("=")[0].lstrip("+~") for argument in arguments}
    [path] = [a.partition("=")[2] for a in arguments if re.match(r"\+*from=", a)][-1:] or [""]
    if path in ("", "null"):
        return quote_overrides(arguments)
    from sdmodule.io.png_metadata import settings_from_png

    settings = settings_from_png(path)
    if given & {"prompts", "prompt", "num_images_per_prompt", "batch_size"}:  # then no batch is like the image's
        given |= {"batch_size", "data.batch_row"}
    if "prompts" in given:
        given.add("prompt")
    if "tomesd_cfg" in given:
        given.add("tome")
    if "speed" in given:
        given |= _keys_of_presets(arguments)
    needed = {"image", "mask"} if settings.get("model") == "inpaint" else set()
    needed |= {"control"} if "controlnet" in settings else set()
    if missing := needed - given - set(settings):
        raise SettingsError(
            f"from={path} was made from images, and the inputs/ of its run are not beside its folder; "
            f"give {' and '.join(f'{name}=…' for name in sorted(missing))} too."
        )
    taken = {k: v for k, v in settings.items() if not given & {k, k.partition(".")[0], f"sampler.{k}"}}
    return _options_first(
        [*(f"{key}={_expression(value)}" for key, value in taken.items()), *quote_overrides(arguments)]
    )


def _keys_of_presets(arguments: Sequence[str]) -> set[str]:
    """What the presets that are given set beside their own group; of a sweep, what any of them does."""
    presets = {name for a in arguments if (given := re.match(r"\+*speed=(.*)", a)) for name in given[1].split(",")}
    if presets <= {"exact", "rounding"}:
        return {"precision"}
    return {"steps", "sampler.scheduler", "tome", "precision"}


def _without_option(arguments: Sequence[str]) -> list[str]:
    """``--from IMAGE`` and ``--from=IMAGE`` as ``from=IMAGE``."""
    rest, result = list(arguments), []
    while rest:
        argument = rest.pop(0)
        if argument == "--from":
            if not rest:
                raise SettingsError("--from names no image; give --from IMAGE.png.")
            argument = f"from={rest.pop(0)}"
        result.append(argument.removeprefix("--") if argument.startswith("--from=") else argument)
    return result


def _expression(value: Any) -> str:
    """A plain value in Hydra's grammar."""
    if isinstance(value, str):
        return _literal(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_expression, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_expression(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def _is_list(value: str) -> bool:
    """Whether the bracket that opens the value is closed by its last letter; ``[a] cat [b]`` is ordinary text."""
    if not value.startswith("[") or not value.endswith("]"):
        return False
    depth = 0
    brackets = re.findall(r"[\[\]]", re.sub(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", "", value))
    for bracket in brackets[:-1]:
        depth += 1 if bracket == "[" else -1
        if depth == 0:
            return False
    return True


def verbatim(value: Any) -> Any:
    """Settings in which no text means anything to OmegaConf any more.

    ``hydra.utils.instantiate`` resolves what it is given once again, so a prompt with ``${x}`` or of ``???`` would not
    survive it. Such a text becomes a node that Hydra builds: a call of ``json.loads``.
    """
    if isinstance(value, dict):
        return {key: verbatim(item) for key, item in value.items()}
    if isinstance(value, list):
        return [verbatim(item) for item in value]
    if isinstance(value, str) and ("${" in value or value == MISSING):
        return {"_target_": "json.loads", "s": json.dumps(value).replace("$", r"\u0024").replace("?", r"\u003f")}
    return value
