"""Keys that were given and that nothing in the run reads, such as ``resolution`` with ``data=shapes``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdmodule.cli.key_hints import references
from sdmodule.errors import SettingsError

BUILT = ("model", "data", "cache", "trainer", "callbacks", "logger")
"""Groups that a command builds objects of."""

READ = ("seed", "output_dir", "ckpt_path", "validate_first", "resume", "from", "experiment", "hydra", "progress")
"""Keys that a command reads itself, or that change others."""


def check_used(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Check that every key that was given has something that reads it.

    Args:
        cfg: composed configuration of a command, not resolved.
        overrides: as Hydra reads them.

    Raises:
        SettingsError: for a key without effect.
    """
    raw: Any = OmegaConf.to_container(cfg, resolve=False)
    if "model" not in raw:  # a command that builds nothing reads all of its keys itself
        return
    used = _reachable(raw)
    for override in overrides:
        key = override.partition("=")[0].lstrip("+").partition("@")[0]
        if override.startswith(("~", "+")) or key.partition(".")[0] not in raw:  # deleted, added, or of global keys
            continue
        readers = used - {"cache"} if key == "cache.verify" else used  # which the data read, if any do
        if not any(_is_part(key, one) or _is_part(one, key) for one in readers):
            chosen = ", ".join(f"{group}={_kind(raw[group])}" for group in ("model", "data"))
            raise SettingsError(f"{override}: nothing in this run uses {key} (it has {chosen}); leave it out.")


def _reachable(raw: dict[str, Any]) -> set[str]:
    """Keys that what is built holds or refers to, through other keys too."""
    used: set[str] = set(READ)
    left = [key for key in BUILT if key in raw]
    while left:
        key = left.pop()
        if key in used:
            continue
        used.add(key)
        value = raw
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None  # type: ignore[assignment]
        left += references(value)
    return used


def _is_part(key: str, of: str) -> bool:
    return key == of or key.startswith(f"{of}.")


def _kind(settings: Any) -> str:
    """Name of the class that a group builds."""
    return str(settings.get("_target_", settings)).rpartition(".")[2] if isinstance(settings, dict) else str(settings)
