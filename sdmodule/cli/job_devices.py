"""Which devices a job of a sweep computes on, where jobs share a machine, and how its further processes start."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from sdmodule.cli.console import echo
from sdmodule.cli.processes import has_sibling_processes
from sdmodule.errors import SettingsError, count_of, is_int
from sdmodule.io.folder_lock import folder_locked

_claimed: list[ExitStack] = []
"""Locks on the GPUs of this process, held until it ends: CUDA cannot change its devices."""


def check_launcher(name: str, config: DictConfig) -> None:
    """Check the settings of a launcher that runs jobs side by side, and let joblib run one job per GPU.

    Args:
        name: of the launcher.
        config: composed configuration of the sweep.

    Raises:
        SettingsError: if the jobs would get in each other's way, or would not start.
    """
    if has_sibling_processes():
        raise SettingsError(
            f"hydra/launcher={name}: each process that torchrun or srun has started would start all jobs; start the "
            "sweep without them."
        )
    launcher, devices = config.hydra.launcher, OmegaConf.select(config, "trainer.devices")
    tasks = launcher.get("tasks_per_node", 1)
    if name == "submitit_local" and tasks != 1:
        raise SettingsError(
            f"hydra.launcher.tasks_per_node={tasks}: each task would run the whole job; leave it out, trainer.devices "
            "starts the processes of a job."
        )
    if name == "submitit_slurm" and is_int(devices) and devices > 0 and devices != tasks:
        raise SettingsError(
            f"hydra.launcher.tasks_per_node={tasks}: trainer.devices={devices} needs one task for each; set "
            f"hydra.launcher.tasks_per_node={devices}."
        )
    if name == "joblib" and (groups := gpu_groups(config)):
        if launcher.n_jobs > groups:
            raise SettingsError(
                f"hydra.launcher.n_jobs={launcher.n_jobs}: the GPUs of this machine are enough for "
                f"{count_of(groups, 'job')} with trainer.devices={devices} at a time; leave it out."
            )
        if launcher.n_jobs == -1:
            launcher.n_jobs = groups


def gpu_groups(config: DictConfig) -> int:
    """How many jobs can run on the GPUs of this machine at a time; 0 if the jobs use none, or choose their own."""
    wanted = wanted_gpus(config)
    return max(len(visible_gpus()) // wanted, 1) if wanted and visible_gpus() else 0


def wanted_gpus(config: DictConfig) -> int:
    """Number of GPUs that a job is given: ``trainer.devices``, or all; 0 if it uses none, or chooses its own."""
    devices = OmegaConf.select(config, "trainer.devices")
    if OmegaConf.select(config, "trainer.accelerator") not in ("auto", "gpu", "cuda"):
        return 0
    if devices in (-1, "-1", "auto"):
        return len(visible_gpus())
    return devices if is_int(devices) and devices > 0 else 0


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as ``CUDA_VISIBLE_DEVICES`` names them; CUDA is not initialised."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(number) for number in range(count)]


def claim_gpus(config: DictConfig, visible: str | None) -> None:
    """Let this process see the GPUs that it needs and no other job of the user has; wait until there are such.

    A process keeps them until it ends.

    Args:
        config: composed configuration of the job.
        visible: ``CUDA_VISIBLE_DEVICES`` of the process that started the sweep; launchers change it.
    """
    if _claimed:
        return
    before = os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible
    names, wanted = visible_gpus(), wanted_gpus(config)
    if not names or not 0 < wanted <= len(names):
        if before is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
        return
    told = False
    while len(taken := _lock(names, wanted)) < wanted:
        if not told:
            echo(f"Waiting for {count_of(wanted, 'GPU')} that other jobs use")
            told = True
        time.sleep(1)
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(taken)


def _lock(names: Sequence[str], wanted: int) -> list[str]:
    """Lock so many GPUs, or none if fewer are free."""
    taken: list[str] = []
    with ExitStack() as locks:
        for name in names:
            try:
                locks.enter_context(folder_locked(Path(tempfile.gettempdir(), f"sdmodule-{os.getuid()}-gpu-{name}"), 0))
            except SettingsError:  # another job has it
                continue
            taken.append(name)
            if len(taken) == wanted:
                _claimed.append(locks.pop_all())
                return taken
    return []


@contextmanager
def processes_started_by(command: Sequence[str], variables: Mapping[str, str]) -> Iterator[None]:
    """Within the block Lightning starts the processes of further devices by a command, not by this one's arguments.

    What it sets in the environment for them is undone at the end: the next job may start processes of its own.

    Args:
        command: of each process.
        variables: of the environment, beside those of this process.
    """
    from lightning.pytorch.strategies.launchers import subprocess_script

    by_arguments, environment = subprocess_script._hydra_subprocess_cmd, dict(os.environ)
    subprocess_script._hydra_subprocess_cmd = lambda local_rank: (command, os.getcwd())
    os.environ.update(variables)
    try:
        yield
    finally:
        subprocess_script._hydra_subprocess_cmd = by_arguments
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
