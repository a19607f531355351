"""All that can be set in a command: the keys of its composed configuration, its groups, and their options."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdmodule.cli.config_files import Setting, file_chain, read_config
from sdmodule.cli.config_keys import conf_dir
from sdmodule.cli.startup import config_store_uncopied

COMMANDS = ("predict", "train")
"""Commands whose keys hints point to."""


class CommandTree:
    """What one command takes.

    Args:
        command: name of its primary configuration, ``train`` or ``predict``.
        arguments: what was typed; options of groups are taken from it where they exist.
        cfg: its composed configuration; by default composed from the options in ``arguments``.
        loader: Hydra's, which knows further folders that the user has named.
    """

    def __init__(
        self, command: str, arguments: Sequence[str] = (), cfg: DictConfig | None = None, loader: Any = None
    ) -> None:
        self.command = command
        self._loader = loader or ConfigLoaderImpl(create_config_search_path("pkg://sdmodule.conf"))
        primary = conf_dir() / f"{command}.yaml"
        self._chosen: list[Setting] = read_config(primary).groups if primary.is_file() else []
        self.own_groups = [one.name for one in self._chosen]
        self._arguments = arguments
        self._composed = cfg

    @cached_property
    def cfg(self) -> DictConfig:
        """The composed configuration."""
        if self._composed is not None:
            return self._composed
        given = [text for text in self._arguments if text.partition("=")[2] in self.options(text.partition("=")[0])]
        with config_store_uncopied():
            with contextlib.suppress(HydraException, OmegaConfBaseException, ValueError):
                return self._loader.load_configuration(self.command, given, RunMode.RUN)
            return self._loader.load_configuration(self.command, [], RunMode.RUN)

    def options(self, group: str) -> list[str]:
        """Options of a group of any command, in alphabetical order; none if there is no such group."""
        return self._loader.repository.get_group_options(group) if group else []

    @cached_property
    def choices(self) -> dict[str, list[str]]:
        """The chosen options of each group of the command, in the order of the configuration."""
        known = self.cfg.hydra.runtime.choices
        chosen = {one.name: known.get(one.name, re.findall(r"\w+", one.value)) for one in self._chosen}
        chosen |= {group: option for group, option in known.items() if group not in chosen and "@" not in group}
        as_lists = {group: option if isinstance(option, list) else [option] for group, option in chosen.items()}
        return {
            group: [str(one) for one in options if one not in (None, "null")] for group, options in as_lists.items()
        }

    def comment(self, group: str) -> str:
        """What the primary configuration says of a group."""
        return next((one.comment for one in self._chosen if one.name == group), "")

    def offered(self, group: str) -> list[str]:
        """Options of a group that make sense in this command: those that the comment on the group names, if it does."""
        comment, options = self.comment(group), self.options(group)
        if group == "data" and self.command == "predict":
            return self.choices["data"]
        if " | " not in comment or "…" in comment:
            return options
        return [name for name in options if name in re.findall(r"\w+", comment)]

    def has(self, name: str) -> bool:
        """Whether the command has a key, with any options, or a group of this name."""
        return name in self.choices or name in self.keys or name in self.unchosen_keys

    @cached_property
    def keys(self) -> dict[str, Any]:
        """Every key of the composed configuration by its dotted name, with its value as configured."""
        settings: Any = OmegaConf.to_container(self.cfg, resolve=False)
        return dict(_keys({key: value for key, value in settings.items() if key != "hydra"}))

    @cached_property
    def hydra_keys(self) -> dict[str, Any]:
        """The same of Hydra's own settings."""
        return dict(_keys({"hydra": OmegaConf.to_container(self.cfg.hydra, resolve=False)}))

    @cached_property
    def unchosen_keys(self) -> dict[str, list[str]]:
        """Keys that only options set which are not chosen, with these: ``{"tuning.rank": ["tuning=lora"], …}``."""
        found: dict[str, list[str]] = {}
        for group in self.choices:
            if group.startswith("hydra") or group == "experiment":
                continue
            for option in self.offered(group):
                names = dict.fromkeys(key.name for file in file_chain(conf_dir(), group, option) for key in file.keys)
                for key in names:
                    if key not in self.keys:
                        found.setdefault(key, []).append(f"{group}={option}")
        return found


def _keys(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
