"""What the YAML files of ``conf/`` say about their keys beyond the values.

A comment that begins with a tag tells the command line how to read a value, for its key or for all keys below it:

- ``# prompt:`` is what people write, kept letter for letter, brackets too; a list is what has all its texts in quotes.
- ``# text:`` is kept letter for letter too, but anything in brackets is a list, such as one of paths.
- ``# paths:`` is one path, or a list in brackets of paths and of settings in braces.
- ``# path:`` and ``# name:`` are read by Hydra where it can, so that a sweep may run over several; they stay text even
  if they look like numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from sdmodule.cli.config_files import GLOBAL

KEY = re.compile(r"( *)(\w+): *([^\s#])?")
TAG = re.compile(r"\s# (prompt|text|paths|path|name): ")


@cache
def key_tags() -> dict[str, str]:
    """Tag of each tagged key of ``conf/``: ``{"prompt": "text", "data.root": "path", …}``."""
    return read_tags(conf_dir())


def read_tags(folder: Traversable, groups: tuple[str, ...] = ()) -> dict[str, str]:
    """Tags of the keys in the YAML files of a folder and of the folders in it.

    Args:
        folder: where to look.
        groups: configuration groups that the folder belongs to, outermost first.
    """
    tags: dict[str, str] = {}
    for entry in folder.iterdir():
        if entry.is_dir():
            tags |= read_tags(entry, (*groups, entry.name))
        elif entry.name.endswith(".yaml"):
            text = entry.read_text(encoding="utf-8")
            at_root = text.startswith(GLOBAL) or groups[:1] == ("shared",)
            tags |= dict(_tagged_keys(text, "" if at_root else "".join(f"{name}." for name in groups[:1])))
    return tags


def _tagged_keys(text: str, prefix: str) -> Iterator[tuple[str, str]]:
    parents: list[tuple[int, str, str | None]] = []  # indentation, key and tag
    for line in text.splitlines():
        if (found := KEY.match(line)) is None:
            continue
        indent = len(found[1])
        while parents and parents[-1][0] >= indent:
            parents.pop()
        key = f"{parents[-1][1]}.{found[2]}" if parents else prefix + found[2]
        own = TAG.search(line)
        tag = own[1] if own else parents[-1][2] if parents else None
        parents.append((indent, key, tag))
        if tag and found[3]:  # a key with keys below it has no value of its own
            yield key, tag


def side_effects(cfg: DictConfig, group: str) -> str:
    """What the chosen option of a group sets in other groups: ``tuning=lora sets model.optimizer.lr=0.0001``.

    Args:
        cfg: composed configuration of a command; a key that was set to another value since is left out.
        group: name of the group.
    """
    choice = HydraConfig.get().runtime.choices.get(group)
    file = conf_dir() / group / f"{choice}.yaml"
    if not file.is_file() or not file.read_text(encoding="utf-8").startswith(GLOBAL):
        return ""
    settings = {key: value for key, value in _load(file).items() if key not in (group, "defaults")}
    effects = [f"{key}={value}" for key, value in _leaves(settings) if OmegaConf.select(cfg, key) == value]
    return f"{group}={choice} sets {', '.join(effects)}" if effects else ""


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _load(file: Traversable) -> dict[str, Any]:
    loaded: Any = OmegaConf.to_container(OmegaConf.create(file.read_text(encoding="utf-8")))
    return loaded


def conf_dir() -> Traversable:
    """The folder of the configuration."""
    return resources.files("sdmodule.conf")
