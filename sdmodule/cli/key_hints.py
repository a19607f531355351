"""The key, the group or the option that was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from difflib import SequenceMatcher
from typing import Any

CUTOFF = 0.7
"""Likeness from 0 to 1 that a hint must have."""

MARGIN = 0.05
"""How much less alike than the best another hint may be."""

MOST = 3
"""Hints that are given at most."""

OTHER_NAMES = {"learning_rate": "lr", "cfg": "guidance_scale", "cfg_scale": "guidance_scale", "folder": "root"}
"""What keys are called elsewhere."""


def nearest_keys(typed: str, keys: Mapping[str, Any]) -> list[str]:
    """The keys that are most like what was typed, best first; none if none is like it.

    The last part of a path counts most: ``lr`` and ``optimizer.lr`` mean ``model.optimizer.lr``. A key that only hands
    on the value of another one in the list is left out.

    Args:
        typed: a key that does not exist.
        keys: what exists, by dotted name, with its value as configured.
    """
    before, dot, last = typed.rpartition(".")
    typed = before + dot + OTHER_NAMES.get(last.lower(), last)
    alike = {key: likeness(typed, key) for key in keys}
    best = max(alike.values(), default=0.0)
    margin = MARGIN / 5 if best > 0.98 and "_" in typed else MARGIN  # max_steps means no other steps
    close = [key for key in alike if alike[key] >= max(CUTOFF, best - margin)]
    handed_on = {key for key in close if any(name in close for name in references(keys[key]))}
    return sorted((key for key in close if key not in handed_on), key=lambda key: (-alike[key], len(key)))[:MOST]


def nearest_names(typed: str, names: Iterable[str]) -> list[str]:
    """The names that are most like what was typed, such as options of a group."""
    return nearest_keys(typed.replace(".", "_"), dict.fromkeys(names))


def references(value: Any) -> list[str]:
    """The keys that a value refers to: ``sampler`` of ``${sampler}``, ``steps`` of ``${oc.select:steps,50}``."""
    if isinstance(value, dict):
        return [name for inner in value.values() for name in references(inner)]
    if isinstance(value, list):
        return [name for inner in value for name in references(inner)]
    if not isinstance(value, str):
        return []
    return re.findall(r"\$\{(?:oc\.select:|given:)?(\w[\w.]*)(?=[,}])", value)


def likeness(typed: str, key: str) -> float:
    """How much alike two dotted names are, from 0 to 1; the last part counts most."""
    typed_parts, parts = _parts(typed), _parts(key)
    last = _likeness_of_parts(typed_parts[-1], parts[-1])
    if len(typed_parts) == 1:
        return last - 0.01 * (len(parts) > 1)
    if last < 0.6:
        return 0.0
    before = ".".join(typed_parts[:-1])
    starts = {".".join(parts[:-1]), ".".join(parts[-len(typed_parts) : -1])}
    return 0.85 * last + 0.15 * max(_ratio(before.replace("_", ""), start.replace("_", "")) for start in starts)


def _parts(name: str) -> list[str]:
    return name.lower().replace("-", "_").replace("/", ".").split(".")


def _likeness_of_parts(typed: str, part: str) -> float:
    """Likeness of two names without dots: equal but for underscores, equal words in them, or alike letters."""
    letters, others = typed.replace("_", ""), part.replace("_", "")
    ratio = _ratio(letters, others)
    if letters == others:
        return 1.0
    words, other_words = typed.split("_"), part.split("_")
    longer, shorter = (words, other_words) if len(words) > len(other_words) else (other_words, words)
    if longer[-len(shorter) :] == shorter or longer[: len(shorter)] == shorter:
        return 0.88 + 0.1 * ratio
    return ratio


def _ratio(one: str, other: str) -> float:
    return SequenceMatcher(None, one, other, autojunk=False).ratio()
