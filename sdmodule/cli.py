"""The two commands: compose the configuration, build what it names, run, finish."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sdmodule.command_line import quoted
from sdmodule.errors import SettingsError

STARTED = time.strftime("%Y-%m-%d/%H-%M-%S")


def train(cfg: DictConfig) -> None:
    """Fine-tune a model: data, model, callbacks, loggers, trainer, fit."""
    import lightning

    output_dir = prepare_output(cfg, "train")
    lightning.seed_everything(cfg.seed, workers=True, verbose=False)
    data = instantiate(cfg.data)
    model = instantiate(cfg.model)
    callbacks = list(instantiate(cfg.callbacks).values())
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path)
    print(f"Wrote {output_dir}")


def predict(cfg: DictConfig) -> None:
    """Sample pictures: requests, model, callbacks, trainer, predict."""
    output_dir = prepare_output(cfg, "predict")
    data = instantiate(cfg.data)
    model = instantiate(cfg.model)
    callbacks = list(instantiate(cfg.callbacks).values())
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)
    trainer.predict(model, datamodule=data, return_predictions=False)
    print(f"Wrote {output_dir / 'grid.png'}")


def instantiate(node: DictConfig, **extra: Any) -> Any:
    """Build what a node of the configuration names, with plain lists and dictionaries as arguments."""
    try:
        return hydra.utils.instantiate(node, **extra, _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SettingsError):
            cause = cause.__cause__
        raise (cause or error) from None


def prepare_output(cfg: DictConfig, command: str) -> Path:
    """Settle the output folder, the same for all ranks and one for each job of a sweep, and write the configuration.

    Raises:
        SettingsError: if the folder cannot be written.
    """
    hydra_config = HydraConfig.get()
    folder = Path(cfg.output_dir or os.environ.setdefault("SDMODULE_OUTPUT_DIR", f"outputs/{command}/{STARTED}"))
    if hydra_config.mode == RunMode.MULTIRUN:
        folder = folder / str(hydra_config.job.num)
    with open_dict(cfg):
        cfg.output_dir = str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    except OSError as error:
        raise SettingsError(
            f"output_dir={folder} cannot be written ({error.strerror}); give a folder that can be."
        ) from error
    return folder


def run(job: Callable[[DictConfig], None], config_name: str) -> None:
    """Run a command: arguments from the command line, one sentence for a wrong one."""

    def checked(cfg: DictConfig) -> None:
        try:
            job(cfg)
        except SettingsError as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    quiet()
    sys.argv[1:] = quoted(sys.argv[1:])
    hydra.main(config_path="pkg://sdmodule.conf", config_name=config_name, version_base="1.3")(checked)()


def quiet() -> None:
    """Keep messages that nobody can act on out of the terminal."""
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    warnings.filterwarnings("ignore", message=".*is not supported by the model summary.*")
    warnings.filterwarnings("ignore", message=".*module\\(s\\) in eval mode.*")
    warnings.filterwarnings("ignore", message=".*functools.lru_cache.*")
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(lambda record: "litlogger" not in record.getMessage())


def train_main() -> None:
    """Entry point of ``sdmodule-train``."""
    run(train, "train")


def predict_main() -> None:
    """Entry point of ``sdmodule-predict``."""
    run(predict, "predict")
