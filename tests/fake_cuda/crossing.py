"""A copy or synchronisation between host and device, and the line that caused it."""

from __future__ import annotations

import sys
from dataclasses import dataclass
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
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if ours is None and path.is_relative_to(PACKAGE):
            ours = f"{path.relative_to(PACKAGE).as_posix()} {frame.f_code.co_qualname}", frame.f_lineno
        outside = path.is_absolute() and path.parent != Path(__file__).parent and "torch" not in path.parts
        if caller is None and outside:
            caller = (
                f"{'/'.join(path.parts[-2:])}:{frame.f_lineno}",
                f"{path.name} {frame.f_code.co_qualname}",
                frame.f_lineno,
            )
        if ours and caller:
            break
        frame = frame.f_back
    assert caller is not None
    return (*(ours or caller[1:]), caller[0])
