"""Files of prompts: one prompt per line, or one JSON object per line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sdmodule.errors import MAX_SEED, SettingsError, choices, is_int

TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")
"""Texts of a request; those that end in 2 are for the second text encoder."""


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of prompts: each has ``prompt`` and, optionally, the other keys of `TEXTS` and a ``seed``.

    Args:
        path: a ``.txt`` file with one prompt per line, or a ``.jsonl`` file with one object per line; blank lines are
            skipped.

    Raises:
        SettingsError: if the file cannot be read, or has something else in it.
    """
    if path.suffix not in {".txt", ".jsonl"}:
        raise SettingsError(
            f"prompts={path}: must be a .txt (one prompt per line) or .jsonl file (one object per line)."
        )
    if not os.path.isfile(path):
        raise SettingsError(f"prompts={path}: not found; give the path of a .txt or .jsonl file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsError(f"prompts={path}: is not UTF-8 text ({error}); save it as UTF-8.") from error
    lines = {number: line.strip() for number, line in enumerate(text.split("\n"), start=1) if line.strip()}
    if not lines:
        raise SettingsError(f"prompts={path}: is empty; write one prompt per line.")
    if path.suffix == ".txt":
        return [{"prompt": line} for line in lines.values()]
    return [_parse_row(line, f"prompts={path}: line {number}") for number, line in lines.items()]


def _parse_row(line: str, where: str) -> dict[str, Any]:
    allowed = {**dict.fromkeys(TEXTS, "a text"), "seed": f"a whole number from 0 to {MAX_SEED}"}
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"{where} is not JSON ({error}); write one object per line.") from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise SettingsError(f'{where} is {line}, not an object with a "prompt"; write one per line.')
    for name, value in row.items():
        if name not in allowed:
            raise SettingsError(f"{where} has the unknown key {name!r}; use {choices(allowed)}.")
        if not (is_int(value) and 0 <= value <= MAX_SEED if name == "seed" else isinstance(value, str)):
            raise SettingsError(f"{where} has {name}={value!r}; {name} must be {allowed[name]}.")
    return row
