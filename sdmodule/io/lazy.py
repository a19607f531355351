"""Public names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def lazy_attribute(package: str, modules: Mapping[str, str], name: str) -> Any:
    """An attribute of a package, for its ``__getattr__``; torch and diffusers take seconds to import.

    Args:
        package: name of the package.
        modules: module of each public name, relative to the package.
        name: what is asked for.

    Raises:
        AttributeError: for a name that the package does not have.
    """
    if name not in modules:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    return getattr(import_module(f"{package}.{modules[name]}"), name)
