"""The output folder of a run: checked before anything slow, written once the run is known to be possible."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from sdmodule.cli.console import is_rank_zero
from sdmodule.cli.processes import JOB_FOLDER
from sdmodule.cli.yaml_text import is_plain, to_yaml
from sdmodule.errors import check_path, unwritable
from sdmodule.io.atomic import atomic_write_text, remove_leftovers
from sdmodule.io.folder_lock import folder_locked
from sdmodule.io.redact import redact
from sdmodule.io.run_folder import CONFIG, METRICS, next_free
from sdmodule.io.run_part import Part


def prepare_output_dir(cfg: DictConfig) -> Path:
    """The output folder of this job, checked to be writable and set in ``cfg``; nothing is written yet.

    Each job of a sweep gets a folder of its own, and its W&B run joins the group of the sweep. So does each part of a
    run of predict.

    Raises:
        SettingsError: if the folder cannot be written, or there is no such part.
    """
    hydra_config = HydraConfig.get()
    check_path("output_dir", cfg.output_dir)
    folder = Path(str(cfg.output_dir)).expanduser()
    if hydra_config.mode == RunMode.MULTIRUN:
        wandb = OmegaConf.select(cfg, "logger.wandb")
        if wandb is not None and wandb.group is None:
            wandb.group = "/".join(folder.parts[-2:])
        folder = folder / str(hydra_config.job.num)
    elif JOB_FOLDER in os.environ:
        folder = Path(os.environ[JOB_FOLDER])
    elif cfg.get("shard") is not None:
        folder = folder / Part.parse(cfg.shard).folder
    cfg.output_dir = str(folder)
    _continue_wandb_run(cfg, folder)
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as error:
        raise unwritable(folder, error.strerror) from error
    if not nearest.is_dir():
        raise unwritable(folder, f"{nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise unwritable(folder, f"no permission to write in {nearest}")
    return folder


def _continue_wandb_run(cfg: DictConfig, folder: Path) -> None:
    """Let a training that is resumed in its own folder go on in its W&B run, instead of beginning a second one."""
    wandb = OmegaConf.select(cfg, "logger.wandb")
    runs = sorted(folder.glob("wandb/*run-*-*"), key=lambda run: run.name.partition("run-")[2])
    if wandb is None or not cfg.get("ckpt_path") or not runs or wandb.get("id") is not None:
        return
    with open_dict(wandb):
        wandb.id, wandb.resume = runs[-1].name.rpartition("-")[2], "allow"


@contextmanager
def output_dir_locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of the output folder inside the block; the process of rank 0 holds the lock.

    Raises:
        SettingsError: if another run is writing to it, or it cannot be made.
    """
    with ExitStack() as stack:
        if is_rank_zero():
            try:
                stack.enter_context(folder_locked(folder))
            except OSError as error:
                raise unwritable(folder, error.strerror) from error
        yield


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Make the output folder and write ``config.yaml``, without secrets.

    ``metrics.csv`` of an earlier run in the same folder is renamed, because Lightning's CSV logger would delete it.

    Raises:
        SettingsError: if the folder cannot be written.
    """
    if not is_rank_zero():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, *folder.glob("*/")):
            remove_leftovers(place)
        if (metrics := folder / METRICS).exists():
            metrics.rename(folder / f"metrics-{next_free(folder, 'metrics-{}.csv')}.csv")
        _write_redacted(cfg, folder / CONFIG)
        if (sweep := folder.parent / "multirun.yaml").is_file() and HydraConfig.get().mode == RunMode.MULTIRUN:
            _write_redacted(OmegaConf.load(sweep), sweep)
    except OSError as error:
        raise unwritable(folder, error.strerror) from error


def _write_redacted(cfg: Any, file: Path) -> None:
    settings = redact(OmegaConf.to_container(cfg, resolve=False, enum_to_str=True))
    atomic_write_text(file, to_yaml(settings) if is_plain(settings) else OmegaConf.to_yaml(OmegaConf.create(settings)))
