"""Words of a prompt that the embedded model never saw."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from sdmodule.components.source import EMBEDDED
from sdmodule.data.toy.scenes import COLOURS, PLACES, RELATIONS, SHAPES, SIZES
from sdmodule.errors import choices
from sdmodule.sampling.requests import SampleRequest

KNOWN = {
    word
    for text in ("a", "an", "on a background", *COLOURS, *SHAPES, *filter(None, (*SIZES, *PLACES, *RELATIONS)))
    for word in text.split()
}
"""The words of the scenes that the embedded model was trained on."""

MOST = 3
"""Number of unknown words that are named."""


def unknown_words(model: Any, requests: Sequence[SampleRequest]) -> str:
    """One line that names the words which the embedded model never saw, and says what it draws; or nothing.

    Nothing is said of other models, and with adapters and other parts, which may know further words.
    """
    if model.parts.source not in EMBEDDED or model.parts.origin:
        return ""
    prompts = (re.sub(r"\bBREAK\b", " ", request.prompt).lower() for request in requests)
    words = (word for prompt in prompts for word in re.findall(r"[^\W\d_]+", prompt))
    unknown = list(dict.fromkeys(word for word in words if word not in KNOWN))
    if not unknown:
        return ""
    named = ", ".join(f'"{word}"' for word in unknown[:MOST]) + (" and others" if len(unknown) > MOST else "")
    return (
        f"pretrained={model.parts.source} never saw {named}; it draws {choices(f'{shape}s' for shape in SHAPES)}, such "
        'as "a red circle on a blue background".'
    )
