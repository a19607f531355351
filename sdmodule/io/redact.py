"""Removing secrets and the path of the home folder from a configuration before it is written or logged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SECRET_WORDS = frozenset(
    {"key", "apikey", "token", "password", "passwd", "passphrase", "secret", "credential", "credentials"}
)
"""The value of a setting with one of these words in its name is hidden."""

FREE_TEXT = frozenset({"prompt", "negative_prompt"})
"""Settings that hold a user's free text, which is never changed."""

HIDDEN = "…"

SIGNATURE = re.compile(r"(?<=[?&])([\w.-]*(?:sig|signature|token|credential|key)[\w.-]*)=[^&\s]*", re.IGNORECASE)
"""What signs an address."""


def is_secret(name: str) -> bool:
    """Whether the name of a setting stands for a secret: ``api_key`` and ``hubToken`` do, ``tokenizer`` does not."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return not SECRET_WORDS.isdisjoint(word.lower() for word in words)


def shorten_home(text: str) -> str:
    """A path, or a text that contains paths, with ``~`` for the home folder; settings of paths expand it again."""
    home = str(Path.home())
    if home in ("/", "."):
        return text
    return re.sub(rf"(?<![\w/.-]){re.escape(home)}(?=[/\s'\":,;)\]}}]|\Z)", "~", text)


def redact(value: Any, name: str = "") -> Any:
    """A configuration with secrets hidden and the home folder shortened to ``~``.

    Args:
        value: a mapping, a list or a plain value.
        name: name of the setting that has this value.
    """
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(item, name) for item in value]
    if value is not None and not isinstance(value, bool) and is_secret(name):
        return HIDDEN
    if not isinstance(value, str) or name in FREE_TEXT:
        return value
    override = re.match(r"([+~]*)([\w./@]+)=", value)
    if override and is_secret(override[2]):
        return f"{override[0]}{HIDDEN}"
    if "://" in value:
        value = SIGNATURE.sub(rf"\1={HIDDEN}", re.sub(r"(?<=://)[^/@\s]+@", f"{HIDDEN}@", value))
    return shorten_home(value)
