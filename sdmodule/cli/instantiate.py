"""What the configuration names is built: the one place beside the commands that knows Hydra."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from sdmodule.cli.error_messages import one_line
from sdmodule.cli.overrides import verbatim
from sdmodule.errors import SettingsError

if TYPE_CHECKING:
    from lightning import Trainer

EXTRAS = ("bitsandbytes", "deepspeed", "mlflow", "tensorboard")
"""Packages that some settings need and that are installed only by their extra."""


def build_trainer(cfg: DictConfig) -> Trainer:
    """Build callbacks and loggers, and the trainer that has them."""
    callbacks = build_entries(cfg, "callbacks")
    if cfg.get("cache"):
        callbacks.append(instantiate(cfg.cache))
    return instantiate(cfg.trainer, callbacks=callbacks, logger=build_entries(cfg, "logger"))


def build_entries(cfg: DictConfig, group: str) -> list[Any]:
    """Build every entry of a group that has several, or none; one that is null is left out.

    Raises:
        SettingsError: for settings of an entry that was not chosen, such as an experiment may have.
    """
    from lightning import Callback
    from lightning.pytorch.loggers import Logger

    node = cfg.get(group)
    built = {name: entry for name, entry in instantiate(node).items() if entry is not None} if node else {}
    for name, entry in built.items():
        if not isinstance(entry, (Callback, Logger, dict)):
            raise SettingsError(
                f"{group}.{name}={entry} is not allowed; give its settings, or take {name} out of {group}."
            )
        if isinstance(entry, dict):
            raise SettingsError(
                f"{group}.{name} has settings, {', '.join(entry)}, and {group} does not name it; add {name} to "
                f"{group}=[…], or take the settings out with ~{group}.{name}."
            )
    return list(built.values())


def instantiate(node: DictConfig, **extra: Any) -> Any:
    """Build what a node of the configuration names, with plain lists and dictionaries as arguments.

    Raises:
        SettingsError: for a value that is not given, and for settings that the target does not take.
    """
    try:
        settings = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        return hydra.utils.instantiate(verbatim(settings), **extra, _convert_="all")
    except MissingMandatoryValue as error:
        raise SettingsError(f"{error.full_key} is not given; add {error.full_key}=… to the command.") from error
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SettingsError):
            cause = cause.__cause__
        if cause is None and isinstance(error.__cause__, Exception):
            name = node._get_full_key(None)
            for package in EXTRAS:
                if package in str(error.__cause__) and isinstance(error.__cause__, ImportError):
                    install = f"pip install 'sdmodule[{package}]'"
                    raise SettingsError(f"{name}={package} needs the package {package}; {install}.") from error
            cause = unknown_argument(error, name) or SettingsError(
                f"{name}: these settings cannot be used: {one_line(error.__cause__)}"
            )
        raise (cause or error) from error
    except (TypeError, ValueError, AttributeError) as error:  # Hydra's own, for what it cannot read
        name = node._get_full_key(None) if isinstance(node, DictConfig) else "settings"
        raise SettingsError(f"{name}: these settings cannot be used: {one_line(error)}") from error


def unknown_argument(error: InstantiationException, name: str) -> SettingsError | None:
    """What to do with a setting that a target does not take; None for an error of another kind."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error.__cause__))
    if found is None:
        return None
    inner = re.search(r"full_key: (\S+)", str(error))
    key = ".".join([name, *([inner[1]] if inner else []), found[2]])
    return SettingsError(f"{key} is no setting of {found[1]}; leave it out, or, where a file sets it, add ~{key}.")
