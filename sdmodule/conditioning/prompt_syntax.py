"""The syntax of prompts: weighted words, and the word that starts a new chunk."""

from __future__ import annotations

import re
from itertools import groupby
from operator import itemgetter
from textwrap import shorten

from sdmodule.errors import SettingsError

MAX_WEIGHT = 10.0
"""Largest weight of a word."""

_BREAK = re.compile(r"\s*(?<!\\)\bBREAK\b\s*")
"""A word in capitals that ends a chunk of a prompt, as in AUTOMATIC1111's web UI."""

LITERAL_BREAK = r"\BREAK"
"""That word as text."""

_SYNTAX = re.compile(
    r"""
    \\ (?P<escaped> [()] )
    | (?P<opening> \( )
    | : \s* (?P<weight> [+-]? (?: \d+ \.? \d* | \. \d+ ) (?: e [+-]? \d+ )? ) \s* \)
    | (?P<closing> \) )
    | [^\\():]+
    | [\\:]
    """,
    re.VERBOSE | re.IGNORECASE,
)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    r"""Split a prompt into pieces of text and their weights.

    Only ``(words:1.3)`` sets a weight; nested weights multiply. Any other parenthesis is literal text, and ``\(`` and
    ``\)`` always are.

    Args:
        prompt: what the user wrote.

    Returns:
        Pieces in order, with neighbours of equal weight joined; a prompt without weights is one piece of weight 1.

    Raises:
        SettingsError: if a weight, or the product of nested ones, is negative or above `MAX_WEIGHT`.

    Example:
        >>> parse_weights("a (red:1.3) cat (sleeping)")
        [('a ', 1.0), ('red', 1.3), (' cat (sleeping)', 1.0)]
    """
    pieces = [("", 1.0)]
    groups: list[int] = []  # index in pieces of each open parenthesis
    for match in _SYNTAX.finditer(prompt):
        if match["weight"] and groups and groups[-1] + 1 < len(pieces):
            start, factor = groups.pop(), _parse_weight(match["weight"], prompt)
            pieces[start:] = [(text, weight * factor) for text, weight in pieces[start + 1 :]]
            if (largest := max(weight for _, weight in pieces[start:])) > MAX_WEIGHT:
                raise _weight_error(f"{largest:g} (nested weights multiply)", prompt)
            continue
        if match["opening"]:
            groups.append(len(pieces))
        elif groups and (match["closing"] or match["weight"]):
            groups.pop()
        pieces.append((match["escaped"] or match[0], 1.0))
    joined = [("".join(text for text, _ in run), weight) for weight, run in groupby(pieces, key=itemgetter(1))]
    return [piece for piece in joined if piece[0]] or [("", 1.0)]


def escape_prompt(text: str) -> str:
    r"""Escape the parentheses and ``BREAK`` of a text, so that it is a prompt without weights in one piece.

    Example:
        >>> escape_prompt("a clock (12:30)")
        'a clock \\(12:30\\)'
    """
    return re.sub(r"([()]|\bBREAK\b)", r"\\\1", text)


def _parse_weight(number: str, prompt: str) -> float:
    weight = float(number)
    if not 0 <= weight <= MAX_WEIGHT:
        raise _weight_error(number, prompt)
    return weight


def _weight_error(weight: str, prompt: str) -> SettingsError:
    return SettingsError(
        f"prompt={shorten(prompt, 200)!r}: the weight {weight} must be from 0 to {MAX_WEIGHT:g}; "
        r"change it, or write \( and \) for literal parentheses."
    )


def split_at_breaks(text: str) -> list[str]:
    """A text at each ``BREAK``, with those that are escaped as text.

    Example:
        >>> split_at_breaks("a cat BREAK a dog")
        ['a cat', 'a dog']
    """
    return [part.replace(LITERAL_BREAK, "BREAK") for part in _BREAK.split(text)]
