"""A copy or synchronisation between host and device, and the line that caused it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import sdmodule

PACKAGE = Path(sdmodule.__file__).parent


@dataclass(frozen=True)
class Crossing:
    """One copy or synchronisation.

    Attributes:
        kind: ``to device``, ``to host`` or ``sync``.
        what: the operation, with the shape that is copied.
        place: innermost file of ``sdmodule`` on the stack, and its function: ``speed/apply.py apply_speed``; the test's
            if there is none.
        line: in that file.
        caller: file and line that called torch: in ``sdmodule`` or a library that it uses.
        waits: whether the host waits, which it does but for ``non_blocking`` copies from or to pinned memory.
    """

    kind: str
    what: str
    place: str
    line: int
    caller: str
    waits: bool

    def __str__(self) -> str:
        return (
            f"{self.kind}{'' if self.waits else ' (pinned)'}: {self.what} at {self.place}:{self.line} ({self.caller})"
        )


def find_place() -> tuple[str, int, str]:
    """Innermost file and function of ``sdmodule``, its line, and the file and line that called torch."""
    frame: Any = sys._getframe(2)
    caller = ours = None
    while frame is not None and not (ours and caller):
        own, shown = _file(frame.f_code.co_filename)
        if ours is None and own:
            ours = f"{own} {frame.f_code.co_qualname}", frame.f_lineno
        if caller is None and shown:
            name = f"{shown.rpartition('/')[2]} {frame.f_code.co_qualname}"
            caller = f"{shown}:{frame.f_lineno}", name, frame.f_lineno
        frame = frame.f_back
    assert caller is not None
    return (*(ours or caller[1:]), caller[0])


@cache
def _file(name: str) -> tuple[str | None, str | None]:
    """A file's path in ``sdmodule``, and its folder and name if it is not torch's or of this folder; None if not."""
    path = Path(name)
    own = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else None
    calls = path.is_absolute() and path.parent != Path(__file__).parent and "torch" not in path.parts
    return own, "/".join(path.parts[-2:]) if calls else None
