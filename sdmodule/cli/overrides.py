"""Arguments of the command line as overrides that Hydra reads, with free text protected from its grammar."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from sdmodule.cli.config_keys import key_tags
from sdmodule.errors import SettingsError

MISSING = "???"
"""What OmegaConf takes for a value that is not given."""

_QUOTED = r"""\s*(?:"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')\s*"""
QUOTED_LIST = re.compile(rf"\[(?:{_QUOTED}(?:,{_QUOTED})*)?\]")
"""A list whose texts are all in quotes, or an empty one."""

INNER_PATH = re.compile(r"(\b(?:path|root|shards|val_shards|name)\s*:\s*)([^'\"\s\[{][^}]*?)(?=\s*(?:,\s*\w+\s*:|}))")
"""A path without quotes within settings in braces, such as ``{path: lr=1e-4,rank=4/adapter.safetensors}``."""

WITH_A_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    "--experimental-rerun",
)
"""Options of Hydra that are followed by their value."""


def quote_overrides(arguments: Sequence[str]) -> list[str]:
    """Overrides in which the values of text keys are quoted, so that they reach the configuration letter for letter.

    The tags of `sdmodule.cli.config_keys` say which keys hold text, and what counts as a list of texts; ``null`` stays
    null. Paths and names are quoted only if Hydra cannot read them or would read a number.

    Example:
        >>> quote_overrides(["prompt=a cat, (fluffy:1.2)", "steps=20"])
        ["prompt='a cat, (fluffy:1.2)'", 'steps=20']
    """
    return [_quote_override(argument) for argument in _options_first(arguments)]


def _options_first(arguments: Sequence[str]) -> list[str]:
    """Options such as ``-m`` before all overrides: Hydra's parser wants the overrides in one block."""
    options: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_override = before not in WITH_A_VALUE and re.match(r"[^-=][^=]*=|~", argument)
        (overrides if is_override else options).append(argument)
    return options + overrides


def _quote_override(argument: str) -> str:
    key, equals, value = argument.partition("=")
    tag = key_tags().get(key.lstrip("+")) if equals else None
    if tag == "prompt" and value != "null" and not QUOTED_LIST.fullmatch(value):
        return f"{key}={quote_verbatim(value)}"
    if tag == "text" and value != "null" and not _is_list(value):
        return f"{key}={quote_verbatim(value)}"
    if tag == "paths" and value != "null":
        return f"{key}={_quote_paths(value)}"
    if tag in ("path", "name") and not _reads_as_text(argument):
        return f"{key}={_quote(value)}"
    if equals and value.startswith(("[", "{")) and not reads(argument):
        return f"{key}={INNER_PATH.sub(lambda found: found[1] + _quote(found[2]), value)}"
    return argument


def _quote_paths(value: str) -> str:
    """One path, or a list of paths and settings, each quoted where Hydra cannot read it or would read a number."""
    if not value.startswith(("[", "{")):
        return value if _reads_as_text(f"x={value}") else _quote(value)
    if reads(f"x={value}"):
        return value
    if _is_list(value) and "{" not in value:
        return "[" + ",".join(_quote_paths(path.strip()) for path in value[1:-1].split(",")) + "]"
    return INNER_PATH.sub(lambda found: found[1] + _quote(found[2]), value)


def reads(argument: str) -> bool:
    """Whether Hydra's grammar reads an override at all."""
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True


def _reads_as_text(argument: str) -> bool:
    """Whether Hydra's grammar reads an override, and not as a number.

    It does not read ``ckpt_path=step=500.ckpt``, and a folder may be called 2024.
    """
    try:
        value = OverridesParser.create().parse_override(argument).value()
    except HydraException:
        return False
    return not isinstance(value, (int, float))


def quote_verbatim(text: str) -> str:
    """Any text in Hydra's grammar, with no meaning to OmegaConf either."""
    if text == MISSING:
        return f"""'${{oc.select:_,"{MISSING}"}}'"""
    # OmegaConf takes a backslash literally unless it stands before "${".
    return _quote(re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text))


def _quote(text: str) -> str:
    """A text in Hydra's grammar in which OmegaConf still resolves ``${…}``."""
    # Hydra takes a backslash literally unless it stands before a quote.
    text = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + (r"\'" if match[2] else ""), text)
    return f"'{text}'"


def _is_list(value: str) -> bool:
    """Whether the opening bracket of a value is closed by its last character; ``[a] cat [b]`` is ordinary text."""
    if not value.startswith("[") or not value.endswith("]"):
        return False
    depth = 0
    brackets = re.findall(r"[\[\]]", re.sub(r"'(\\.|[^'\\])*'|\"(\\.|[^\"\\])*\"", "", value))
    for bracket in brackets[:-1]:
        depth += 1 if bracket == "[" else -1
        if depth == 0:
            return False
    return True


def with_png_settings(arguments: Sequence[str]) -> list[str]:
    """Quoted overrides, preceded by the settings of the image that ``from=`` or ``--from`` names.

    A key that is given as well wins: the setting, or the settings of the whole group, are not taken from the image.

    Raises:
        SettingsError: if the image does not hold its settings, or was made from other images that are not found.
    """
    arguments = _from_as_override(arguments)
    given = {argument.partition("=")[0].lstrip("+~") for argument in arguments}
    [path] = [a.partition("=")[2] for a in arguments if re.match(r"\+*from=", a)][-1:] or [""]
    if path in ("", "null"):
        return quote_overrides(arguments)
    from sdmodule.io.png_metadata import settings_from_png

    settings = settings_from_png(path)
    if given & {"prompts", "prompt", "num_images_per_prompt", "batch_size"}:  # no batch is then like the image's
        given |= {"batch_size", "data.batch_row"}
    if "prompts" in given:
        given.add("prompt")
    if "tomesd_cfg" in given:
        given.add("tome")
    if "speed" in given:
        given |= _keys_set_by_presets(arguments)
    needed = {"inpaint": {"image", "mask"}, "image2image": {"image"}}.get(settings.get("model", ""), set())
    needed |= {"control"} if "controlnet" in settings else set()
    needed |= {"ip_adapter_image"} if "ip_adapter" in settings else set()
    if missing := needed - given - set(settings):
        raise SettingsError(
            f"from={path}: the images it was made from are not in inputs/ beside its folder; add "
            f"{' and '.join(f'{name}=…' for name in sorted(missing))}."
        )
    taken = {k: v for k, v in settings.items() if not given & {k, k.partition(".")[0], f"sampler.{k}"}}
    return _options_first(
        [*(f"{key}={_expression(value)}" for key, value in taken.items()), *quote_overrides(arguments)]
    )


def _from_as_override(arguments: Sequence[str]) -> list[str]:
    """Arguments with ``--from IMAGE`` and ``--from=IMAGE`` written as ``from=IMAGE``."""
    rest, result = list(arguments), []
    while rest:
        argument = rest.pop(0)
        if argument == "--from":
            if not rest:
                raise SettingsError("--from: no image is given; use --from IMAGE.png.")
            argument = f"from={rest.pop(0)}"
        result.append(argument.removeprefix("--") if argument.startswith("--from=") else argument)
    return result


def _keys_set_by_presets(arguments: Sequence[str]) -> set[str]:
    """Keys outside ``speed`` that the given presets set; in a sweep, those that any of them sets."""
    presets = {name for a in arguments if (given := re.match(r"\+*speed=(.*)", a)) for name in given[1].split(",")}
    if presets <= {"exact", "rounding"}:
        return {"precision"}
    return {"steps", "sampler.scheduler", "tome", "precision"}


def _expression(value: Any) -> str:
    """A plain value in Hydra's grammar."""
    if isinstance(value, str):
        return quote_verbatim(value)
    if isinstance(value, list):
        return "[" + ",".join(map(_expression, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_expression(item)}" for key, item in value.items()) + "}"
    return json.dumps(value)


def verbatim(value: Any) -> Any:
    """Settings that `hydra.utils.instantiate` passes on without resolving them once more.

    Otherwise a prompt with ``${x}`` in it, or the prompt ``???``, would be lost. Such a text becomes a node that Hydra
    builds: a call of ``json.loads``.
    """
    if isinstance(value, dict):
        return {key: verbatim(item) for key, item in value.items()}
    if isinstance(value, list):
        return [verbatim(item) for item in value]
    if isinstance(value, str) and ("${" in value or value == MISSING):
        return {"_target_": "json.loads", "s": json.dumps(value).replace("$", r"\u0024").replace("?", r"\u003f")}
    return value
