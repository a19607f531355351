"""Free text on the command line, kept from Hydra's grammar and from OmegaConf's."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

FREE_TEXT = ("prompt", "negative_prompt", "image", "mask")
"""Keys whose values are what people write, not expressions of Hydra's."""

MISSING = "???"
"""What OmegaConf takes for a value that is not given."""


def quoted(arguments: Sequence[str]) -> list[str]:
    """Quote the values of free-text keys, so that they reach the configuration letter for letter.

    A list in brackets stays a list, and ``null`` stays null.

    Example:
        >>> quoted(["prompt=a cat, (fluffy:1.2)", "steps=20"])
        ["prompt='a cat, (fluffy:1.2)'", 'steps=20']
    """
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if not equals or key.lstrip("+") not in FREE_TEXT or value == "null" or _is_list(value):
        return argument
    if value == MISSING:
        return f"""{key}='${{oc.select:_,"{MISSING}"}}'"""
    # In Hydra's grammar a backslash is itself unless it stands before a quote; in OmegaConf's, before "${".
    value = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    value = re.sub(r"(\\*)('|\Z)", lambda match: match[1] * 2 + (r"\'" if match[2] else ""), value)
    return f"{key}='{value}'"


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
