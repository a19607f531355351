"""From requests to images."""

from __future__ import annotations

from typing import Any

from sdmodule.io.lazy import lazy_attribute

MODULES = {
    "SampleRequest": "requests",
    "Samples": "result",
    "SamplingSettings": "settings",
    "build_requests": "requests",
}

__all__ = [*MODULES]


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, MODULES, name)


def __dir__() -> list[str]:
    return __all__
