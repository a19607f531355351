"""Objects built from nodes of the configuration: the one wrapper around `hydra.utils.instantiate`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sdmodule.cli.error_messages import one_line
from sdmodule.cli.hydra_errors import error_of_resolver
from sdmodule.cli.overrides import verbatim
from sdmodule.errors import SettingsError

if TYPE_CHECKING:
    from lightning import Trainer

EXTRAS = ("bitsandbytes", "mlflow", "tensorboard")
"""Packages that some settings need and that only an extra of sdmodule installs."""


def build_trainer(cfg: DictConfig) -> Trainer:
    """The trainer of a command, with its callbacks and loggers."""
    callbacks = build_entries(cfg, "callbacks")
    if "_target_" in (cfg.get("cache") or {}):
        cache = cfg.cache.copy()
        with open_dict(cache):
            cache.pop("verify", None)  # the data have it
        callbacks.append(instantiate(cache))
    return instantiate(cfg.trainer, callbacks=callbacks, logger=build_entries(cfg, "logger"))


def build_entries(cfg: DictConfig, group: str) -> list[Any]:
    """All callbacks or all loggers; an entry that is null is left out.

    Args:
        cfg: composed configuration of a command.
        group: ``callbacks`` or ``logger``.

    Raises:
        SettingsError: for an entry that is no callback or logger, or has settings but was not chosen.
    """
    from lightning import Callback
    from lightning.pytorch.loggers import Logger

    node = cfg.get(group)
    built = {name: entry for name, entry in instantiate(node).items() if entry is not None} if node else {}
    for name, entry in built.items():
        if isinstance(entry, dict):
            raise SettingsError(
                f"{group}.{name} has settings ({', '.join(entry)}) but is not chosen; add {name} to {group}=[…], or "
                f"remove the settings with ~{group}.{name}."
            )
        if not isinstance(entry, (Callback, Logger)):
            raise SettingsError(f"{group}.{name}={entry}: must be settings; set those, or remove {name} from {group}.")
    return list(built.values())


def instantiate(node: DictConfig, **extra: Any) -> Any:
    """The object that a node of the configuration describes, its arguments plain lists and dictionaries.

    Args:
        node: settings with a ``_target_``, or a dictionary of such nodes.
        extra: further arguments of the target.

    Raises:
        SettingsError: for a missing value, and for settings that the target does not take.
    """
    try:
        settings = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        return hydra.utils.instantiate(verbatim(settings), **extra, _convert_="all")
    except MissingMandatoryValue as error:
        raise SettingsError(f"{error.full_key}: missing; add {error.full_key}=… to the command.") from error
    except OmegaConfBaseException as error:
        raise (error_of_resolver(error) or error) from error  # the others are explained by `hydra_errors`
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
    except (TypeError, ValueError, AttributeError) as error:  # raised by Hydra itself for what it cannot read
        name = node._get_full_key(None) if isinstance(node, DictConfig) else "settings"
        raise SettingsError(f"{name}: these settings cannot be used: {one_line(error)}") from error


def unknown_argument(error: InstantiationException, name: str) -> SettingsError | None:
    """The error for a setting that the target does not take; None if that is not what went wrong."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error.__cause__))
    if found is None:
        return None
    inner = re.search(r"full_key: (\S+)", str(error))
    key = ".".join([name, *([inner[1]] if inner else []), found[2]])
    return SettingsError(f"{key}: {found[1]} has no such setting; leave it out or, if a file sets it, add ~{key}.")
