"""Restore what the commands change for their whole process, and do not compose or read the same again and again."""

from __future__ import annotations

import functools
import io
import logging
import pickle
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import IO, Any
from unittest import mock

import diffusers
import torch
import transformers
import yaml
from hydra._internal import config_loader_impl
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides, create_defaults_list
from hydra.core.default_element import ResultDefault
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from lightning.fabric.utilities import registry
from omegaconf import DictConfig, ListConfig, OmegaConf, grammar_parser
from omegaconf import base as omegaconf_base
from omegaconf._utils import get_yaml_loader

from sdmodule.components import checkpoint
from sdmodule.components.load_network import load_network

LOGGING = ("level", "disabled", "propagate", "filters", "handlers")


def logging_state() -> dict[logging.Logger, tuple[object, ...]]:
    """What is set of each logger."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return {
        one: (one.level, one.disabled, one.propagate, one.filters.copy(), one.handlers.copy())
        for one in loggers
        if isinstance(one, logging.Logger)
    }


@contextmanager
def restored_messages() -> Iterator[None]:
    """Restore loggers, the form of warnings and progress bars, all of which the commands set for their process."""
    before, form = logging_state(), warnings.formatwarning
    bars = [(library, library.utils.logging.is_progress_bar_enabled()) for library in (diffusers, transformers)]
    yield
    for logger, state in logging_state().items():
        if state != before.get(logger, state):
            for name, value in zip(LOGGING, before[logger], strict=True):
                setattr(logger, name, value)
            logger.setLevel(logger.level)  # forgets which levels it has found to be enabled
        elif logger not in before:
            logger.filters.clear()
    warnings.formatwarning = form
    for library, enabled in bars:
        (library.utils.logging.enable_progress_bar if enabled else library.utils.logging.disable_progress_bar)()


class ParsedOnce:
    """`OmegaConf.load`, which remembers what it has parsed."""

    def __init__(self) -> None:
        self.parsed: dict[str, object] = {}

    def load(self, file: IO[str]) -> DictConfig | ListConfig:
        text = file.read()
        if text not in self.parsed:
            self.parsed[text] = yaml.load(text, Loader=get_yaml_loader())
        return OmegaConf.create(self.parsed[text] or {})


class ComposedOnce:
    """What Hydra has composed before from the same files: the list of defaults, and the files merged in its order."""

    def __init__(self) -> None:
        self.lists: dict[object, DefaultsList] = {}
        self.merged: dict[object, DictConfig] = {}

    def create_defaults_list(
        self, repo: IConfigRepository, config_name: str | None, overrides_list: list[Override], **settings: bool
    ) -> DefaultsList:
        chosen = [one.input_line for one in overrides_list if repo.group_exists(one.key_or_group)]
        key = (config_name, *chosen, *settings.values(), *map(str, repo.get_sources()))
        if key not in self.lists:
            self.lists[key] = create_defaults_list(repo, config_name, overrides_list, **settings)
        return replace(self.lists[key], config_overrides=Overrides(repo, overrides_list).config_overrides)

    def merge(self, loader: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        key = (repr(defaults), *map(str, repo.get_sources()))
        if key not in self.merged:
            self.merged[key] = MERGE(loader, defaults, repo)
        return deepcopy(self.merged[key])


MERGE = ConfigLoaderImpl._compose_config_from_defaults_list


@contextmanager
def fast_composition() -> Iterator[None]:
    """Parse each file of the configuration and each interpolation once, and merge the same files once."""
    Plugins.instance()  # imports its modules anew
    reader = sys.modules["hydra._internal.core_plugins.importlib_resources_config_source"]
    once = ComposedOnce()

    def merge(loader: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
        return once.merge(loader, defaults, repo)

    with (
        mock.patch.object(reader, "OmegaConf", ParsedOnce()),
        mock.patch.object(config_loader_impl, "create_defaults_list", once.create_defaults_list),
        mock.patch.object(ConfigLoaderImpl, "_compose_config_from_defaults_list", merge),
        mock.patch.object(omegaconf_base, "parse", Parsed().parse),
    ):
        yield


class Parsed:
    """`omegaconf.grammar_parser.parse`, which remembers the trees of what it has parsed; nothing changes them."""

    def __init__(self) -> None:
        self.trees: dict[object, Any] = {}

    def parse(self, value: str, parser_rule: str = "configValue", lexer_mode: str = "DEFAULT_MODE") -> Any:
        key = (value, parser_rule, lexer_mode)
        if key not in self.trees:
            self.trees[key] = PARSE(value, parser_rule, lexer_mode)
        return self.trees[key]


PARSE = grammar_parser.parse


class WithoutTensors(pickle.Pickler):
    """Pickles the structure of a network, and collects its tensors."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self.numbers: dict[int, int] = {}

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self.numbers[id(value)]


class WithCopies(pickle.Unpickler):
    """Makes the structure again, with copies of the tensors; what was one tensor is one again."""

    def __init__(self, file: IO[bytes], tensors: list[torch.Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors
        self.copies: dict[int, torch.Tensor] = {}

    def persistent_load(self, number: int) -> torch.Tensor:
        if number not in self.copies:
            self.copies[number] = deepcopy(self.tensors[number])
        return self.copies[number]


class Original:
    """A network of which copies are made, in a quarter of the time that `copy.deepcopy` takes."""

    def __init__(self, network: Any) -> None:
        structure = io.BytesIO()
        pickler = WithoutTensors(structure)
        pickler.dump(network)
        self.tensors = pickler.tensors
        self.structure = structure.getvalue()

    def copy(self) -> Any:
        return WithCopies(io.BytesIO(self.structure), self.tensors).load()


class ReadOnce:
    """`load_network`, which remembers what it has read from the same files and gives a copy of it.

    Args:
        only: remember networks of this folder alone; None is for all.
    """

    def __init__(self, only: Path | None = None) -> None:
        self.only = only
        self.networks: dict[object, Original] = {}

    def load(self, kind: Any, location: Any, *inputs: Any, **options: Any) -> Any:
        folder = Path(location, options.get("subfolder") or "")
        files = [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(folder.glob("*"))]
        if not files or (self.only is not None and self.only not in folder.parents):
            return load_network(kind, location, *inputs, **options)
        key = (kind, str(folder), *map(str, inputs), *map(str, options.values()), *files)
        if key not in self.networks:
            self.networks[key] = Original(load_network(kind, location, *inputs, **options))
        return self.networks[key].copy()


@contextmanager
def plugins_found_once() -> Iterator[None]:
    """Look once for the callbacks that installed packages give to every trainer: Lightning reads all their metadata."""
    with mock.patch.object(registry, "entry_points", functools.cache(registry.entry_points)):
        yield


@contextmanager
def networks_read_once(only: Path | None = None) -> Iterator[None]:
    """Read the networks of each checkpoint once, or only those of one: most tests load the same one."""
    with mock.patch.object(checkpoint, "load_network", ReadOnce(only).load):
        yield
