"""Restore what the commands change for their whole process, and let Hydra compose faster than in a real one."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import IO
from unittest import mock

import diffusers
import transformers
import yaml
from hydra.core.plugins import Plugins
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

LOGGING = ("level", "disabled", "propagate", "filters", "handlers")


def logging_state() -> dict[logging.Logger, list[object]]:
    """What is set of each logger."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    return {one: [copy(getattr(one, name)) for name in LOGGING] for one in loggers if isinstance(one, logging.Logger)}


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


@contextmanager
def fast_composition() -> Iterator[None]:
    """Parse each file of the configuration once."""
    Plugins.instance()  # imports its modules anew
    reader = sys.modules["hydra._internal.core_plugins.importlib_resources_config_source"]
    with mock.patch.object(reader, "OmegaConf", ParsedOnce()):
        yield
