"""Paths with ``{000..009}`` and ``{a,b}`` in them, as a shell expands them."""

from __future__ import annotations

import re
from pathlib import Path


def existing_part(path: Path) -> tuple[Path, str]:
    """The longest part of a path that exists, letter for letter, and the rest, which is a pattern.

    So a folder that is called ``set[1]`` or ``a{b}`` is that folder, and no other.
    """
    for folder in (path, *path.parents):
        if folder.exists():
            return folder, "" if folder == path else str(path.relative_to(folder))
    return Path(path.anchor or "."), str(path)


def expand_braces(pattern: str) -> list[str]:
    """The strings that a pattern stands for, as in a shell: ``{000..009}`` counts, ``{a,b}`` gives each alternative."""
    group = re.search(r"\{([^{}]*)\}", pattern)
    if group is None:
        return [pattern]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", group[1]):
        options = [str(number).zfill(len(span[1])) for number in range(int(span[1]), int(span[2]) + 1)]
    else:
        options = group[1].split(",")
    return [text for one in options for text in expand_braces(pattern[: group.start()] + one + pattern[group.end() :])]
