"""A job of a sweep in a process of its own, as joblib, submitit and other launchers start it."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from sdmodule.cli.console import is_rank_zero
from sdmodule.cli.error_messages import sentence_of
from sdmodule.cli.job_devices import claim_gpus, processes_started_by
from sdmodule.cli.overrides import WITH_A_VALUE
from sdmodule.cli.processes import JOB_FOLDER, STARTED
from sdmodule.cli.sweep import RECORD, Sweep
from sdmodule.cli.typed_line import TypedLine
from sdmodule.errors import SettingsError

RANK = "from sdmodule.cli.main import run_rank; run_rank({!r})"
"""Program of the processes for a job's further devices."""


@contextmanager
def job_apart(cfg: DictConfig, sweep: Sweep, typed: TypedLine) -> Iterator[None]:
    """Run the block as a job on devices of its own, and leave a record of how it ended.

    Args:
        cfg: composed configuration of the job.
        sweep: as the process that started the sweep knows it.
        typed: what was typed for the sweep.

    Raises:
        SettingsError: for whatever ends the job, so that it travels to the process that started the sweep.
    """
    hydra = HydraConfig.get()
    folder = Path(hydra.sweep.dir) / str(hydra.job.num)
    overrides = list(hydra.overrides.task)
    if sweep.started is not None:
        os.environ[STARTED] = sweep.started
    if is_rank_zero():
        (folder / RECORD).unlink(missing_ok=True)
    claim_gpus(cfg, sweep.gpus)
    error: str | None = None
    try:
        with processes_started_by(rank_command(typed, overrides), {JOB_FOLDER: str(folder)}):
            yield
    except (SettingsError, HydraException, OmegaConfBaseException) as raised:
        error = sentence_of(raised, typed)
    except SystemExit as end:
        error = f"ended with status {end.code}."
    except Exception as raised:
        traceback.print_exc()
        error = f"{type(raised).__name__}: {raised}"
    if is_rank_zero():
        folder.mkdir(parents=True, exist_ok=True)
        sweep.record(folder, overrides, error)
    if error is not None:
        raise SettingsError(error)


def rank_command(typed: TypedLine, overrides: Sequence[str]) -> list[str]:
    """The command that runs one job of a sweep alone.

    Args:
        typed: what was typed for the sweep.
        overrides: of the job, as Hydra reads them.
    """
    return [sys.executable, "-c", RANK.format(typed.command), *_options(typed), *overrides]


def _options(typed: TypedLine) -> list[str]:
    """Hydra's options of the sweep that choose its configuration, with their values."""
    words = [*typed.arguments, ""]
    options: list[str] = []
    for word, following in pairwise(words):
        if word in WITH_A_VALUE:
            options += [word, following]
        elif word.startswith("--config-"):
            options.append(word)
    return options
