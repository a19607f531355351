"""How ControlNets guide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdmodule.errors import SettingsError, check_bool, check_number

Each = float | Sequence[float]
"""One number for all ControlNets, or one for each."""


@dataclass(frozen=True)
class ControlSettings:
    """How ControlNets guide; every number may be one for all of them, or a list with one for each.

    Args:
        scale: weight of a ControlNet's residuals; 0 turns it off.
        start: share of the steps after which it sets in.
        end: share of the steps after which it ends.
        guess_mode: the ControlNets see the prompt's half of the batch alone, and their residuals grow with depth
            (Zhang et al. 2023, section 3.4, "guess mode" of the released code).

    Raises:
        SettingsError: for a value out of range.
    """

    scale: Each = 1.0
    start: Each = 0.0
    end: Each = 1.0
    guess_mode: bool = False

    def metadata(self) -> dict[str, Any]:
        """The scale, and what else differs from its default, in plain types."""
        said = {"control_scale": self.scale, "control_guidance_start": self.start, "control_guidance_end": self.end}
        usual = {"control_guidance_start": 0.0, "control_guidance_end": 1.0}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in said.items()}
        told = {name: value for name, value in plain.items() if name not in usual or value != usual[name]}
        return told | ({"guess_mode": True} if self.guess_mode else {})

    def __post_init__(self) -> None:
        for name, key, limit in (
            ("scale", "control_scale", 100),
            ("start", "control_guidance_start", 1),
            ("end", "control_guidance_end", 1),
        ):
            value = getattr(self, name)
            for one in _listed(value):
                check_number(key, one, minimum=0, maximum=limit)
            if not isinstance(value, (int, float)):
                object.__setattr__(self, name, tuple(value))
        check_bool("guess_mode", self.guess_mode)
        count = max(len(_listed(value)) for value in (self.start, self.end))
        for start, end in zip(
            *(spread(v, count, "control_guidance_start") for v in (self.start, self.end)), strict=True
        ):
            if start >= end:
                raise SettingsError(
                    f"control_guidance_start={start}, control_guidance_end={end}: the start must be before the end."
                )


def spread(value: Each, count: int, key: str) -> list[float]:
    """A number for each of ``count`` ControlNets.

    Raises:
        SettingsError: for another number of them.
    """
    listed = _listed(value) * (1 if isinstance(value, Sequence) else count)
    if len(listed) != count:
        raise SettingsError(
            f"{key}: {len(listed)} numbers for {count} ControlNet{'s' if count > 1 else ''}; give one for all, or one "
            "for each."
        )
    return listed


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
