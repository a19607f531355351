"""What of a configuration is nobody else's business: keys to services, and where the home folder is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

SECRET_WORDS = frozenset(
    {"key", "apikey", "token", "password", "passwd", "passphrase", "secret", "credential", "credentials"}
)
"""A setting with one of these words in its name is not written down."""

FREE_TEXT = frozenset({"prompt", "negative_prompt"})
"""Settings that are what an image shows, and are written as they are."""

HIDDEN = "…"


def is_secret(name: str) -> bool:
    """Whether a setting of this name is secret: ``api_key`` and ``hubToken`` are, ``tokenizer`` is not."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return not SECRET_WORDS.isdisjoint(word.lower() for word in words)


def shorten_home(text: str) -> str:
    """A path, or a text with paths in it, with ``~`` for the home folder; what reads paths here expands it again."""
    home = str(Path.home())
    if home in ("/", "."):
        return text
    return re.sub(rf"(?<![\w/.-]){re.escape(home)}(?=[/\s'\":,;)\]}}]|\Z)", "~", text)


def redact(value: Any, name: str = "") -> Any:
    """A configuration without secrets and home folders, to be written down or logged.

    Args:
        value: mappings, lists and plain values.
        name: the name of the setting that has this value.
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
    return shorten_home(re.sub(r"(?<=://)[^/@\s]+@", f"{HIDDEN}@", value))
