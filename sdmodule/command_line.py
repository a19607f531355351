"""Free text on the command line, quoted for Hydra's grammar before Hydra sees it."""

from __future__ import annotations

import re
from collections.abc import Sequence

FREE_TEXT = ("prompt", "negative_prompt")
"""Keys whose values are what people write, not expressions of Hydra's."""


def quoted(arguments: Sequence[str]) -> list[str]:
    """Quote the values of free-text keys, so that they reach the configuration letter for letter.

    A value in brackets stays a list, and ``null`` stays null.

    Example:
        >>> quoted(["prompt=a cat, (fluffy:1.2)", "steps=20"])
        ["prompt='a cat, (fluffy:1.2)'", 'steps=20']
    """
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    key, equals, value = argument.partition("=")
    is_list = value.startswith("[") and value.endswith("]")
    if not equals or key.lstrip("+") not in FREE_TEXT or is_list or value == "null":
        return argument
    # In Hydra's grammar a backslash is itself unless it stands before a quote; in OmegaConf's, before "${".
    value = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", value)
    value = re.sub(r"(\\*)('|$)", lambda match: match[1] * 2 + (r"\'" if match[2] else ""), value)
    return f"{key}='{value}'"
