"""The jobs of a sweep under any of Hydra's launchers: what is checked before they start, and what is left of each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode, TaskFunction
from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

from sdmodule.cli.job_devices import check_launcher
from sdmodule.cli.processes import STARTED
from sdmodule.errors import SettingsError, count_of
from sdmodule.io.atomic import atomic_write_text
from sdmodule.io.redact import redact

RECORD = "job.json"
"""What a job that ran in another process leaves in its folder: the sweep, its overrides, and what went wrong."""

FinishedJobs = list[tuple[Path, list[str]]]
"""Output folder and overrides of each finished job of a sweep."""


@dataclass
class Sweep:
    """A sweep, as far as the process that started it and those of its jobs share it.

    Attributes:
        identity: tells it from an earlier sweep in the same folder.
        arguments: of the process that started it, with its program.
        gpus: ``CUDA_VISIBLE_DEVICES`` of that process; None if it may see all.
        started: its ``SDMODULE_STARTED``, which names the output folder.
        launched: whether a launcher was given the jobs.
        finished: jobs that finished, once that is known.
    """

    identity: str = field(default_factory=lambda: uuid4().hex)
    arguments: list[str] = field(default_factory=lambda: list(sys.argv))
    gpus: str | None = field(default_factory=lambda: os.environ.get("CUDA_VISIBLE_DEVICES"))
    started: str | None = field(default_factory=lambda: os.environ.get(STARTED))
    launched: bool = False
    finished: FinishedJobs = field(default_factory=list)

    def record(self, folder: Path, overrides: Sequence[str], error: str | None) -> None:
        """Leave a record of a job in its folder."""
        content = {"sweep": self.identity, "overrides": redact(list(overrides)), "error": error}
        atomic_write_text(folder / RECORD, json.dumps(content, indent=1) + "\n")

    def read_record(self, folder: Path) -> dict[str, Any] | None:
        """The record of a job; None if the job has left none."""
        file = folder / RECORD
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return content if content.get("sweep") == self.identity else None


def runs_apart() -> bool:
    """Whether this job is one of a sweep whose launcher gives each job a process of its own."""
    config = HydraConfig.get()
    return config.mode == RunMode.MULTIRUN and config.runtime.choices["hydra/launcher"] != "basic"


class ReportingLauncher(Launcher):
    """A launcher that says which jobs failed, after all have ended.

    Args:
        launcher: Hydra's, which starts the jobs.
        sweep: gets the jobs that finished.
    """

    def __init__(self, launcher: Launcher, sweep: Sweep) -> None:
        self.launcher = launcher
        self.sweep = sweep
        self.folder = Path()
        self.name = ""

    @override
    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.folder, self.name = Path(config.hydra.sweep.dir), config.hydra.runtime.choices["hydra/launcher"]
        self.launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    @override
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        self.sweep.launched = True
        self._check_folders(job_overrides)
        logs = f"; what they print is in {self.folder}/.submitit" if self.name.startswith("submitit") else ""
        print(f"Starting {count_of(len(job_overrides), 'job')} with hydra/launcher={self.name}{logs}", flush=True)
        lost: Exception | None = None
        returned: Sequence[JobReturn] = []
        try:
            returned = self.launcher.launch(job_overrides, initial_job_idx)
        except Exception as error:  # of the launcher, for a job that was killed
            lost = error
        failed = self._report(job_overrides, initial_job_idx)
        if failed:
            raise SettingsError(f"{failed} of {count_of(len(job_overrides), 'job')} failed.") from lost
        if lost is not None:
            raise lost
        return returned

    def _report(self, job_overrides: Sequence[Sequence[str]], first: int) -> int:
        """Note the jobs that finished, and print what went wrong with the others; returns how many these are."""
        failed = 0
        for number, overrides in enumerate(job_overrides, first):
            folder = self.folder / str(number)
            record = self.sweep.read_record(folder)
            if record is not None and record["error"] is None:
                self.sweep.finished.append((folder, record["overrides"]))
                continue
            failed += 1
            own = [one for one in overrides if any(one not in others for others in job_overrides)]
            reason = record["error"] if record else "has not ended by itself; it was killed, or never started."
            print(f"error: job {number} ({', '.join(redact(own))}): {reason}", file=sys.stderr, flush=True)
        return failed

    def _check_folders(self, job_overrides: Sequence[Sequence[str]]) -> None:
        folders = {one for overrides in job_overrides for one in overrides if one.startswith("output_dir=")}
        if len(folders) > 1:
            raise SettingsError(
                f"output_dir: has {len(folders)} values, which hydra/launcher={self.name} cannot sweep; give one, in "
                "which each job gets a folder of its own."
            )


@contextmanager
def reporting_launchers(sweep: Sweep) -> Iterator[None]:
    """Within the block, Hydra's launchers check the settings that jobs share machines by, and report each job."""
    instantiate = Plugins.instantiate_launcher

    def instantiate_launcher(
        plugins: Plugins, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> Launcher:
        name = OmegaConf.select(config, "hydra.runtime.choices")["hydra/launcher"]
        if name == "basic":
            return instantiate(plugins, hydra_context, task_function, config)
        check_launcher(name, config)
        launcher = ReportingLauncher(instantiate(plugins, hydra_context, task_function, config), sweep)
        launcher.setup(hydra_context=hydra_context, task_function=task_function, config=config)
        return launcher

    Plugins.instantiate_launcher = instantiate_launcher  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Plugins.instantiate_launcher = instantiate  # type: ignore[method-assign]
