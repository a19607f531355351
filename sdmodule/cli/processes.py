"""The processes of one run, as torchrun, SLURM or Lightning start them: a common name, and whether it is a restart."""

from __future__ import annotations

import os
import socket
import time

from sdmodule.training.slurm import started_by_srun

STARTED = "SDMODULE_STARTED"
"""Variable that names the default output folder: the same in all processes of a run, and in all jobs of a sweep."""

JOB_FOLDER = "SDMODULE_JOB_FOLDER"
"""Variable that names the output folder in the processes for further devices of a sweep's job."""


def name_start() -> None:
    """Set `STARTED`, unless it is set: the date and time, where a single process decides.

    ``srun``'s processes take the number of their job and step, which stays the same if the job is requeued; those of
    torchrun take what rank 0 tells them. Nodes that are started by hand, with ``NODE_RANK``, get no name, and so the
    configuration's default.
    """
    if STARTED in os.environ or ("NODE_RANK" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ):
        return
    now = time.strftime("%Y-%m-%d/%H-%M-%S")
    if started_by_srun():
        os.environ[STARTED] = f"slurm-{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ[STARTED] = _told_by_rank_zero(STARTED, now)
    else:
        os.environ[STARTED] = now


def has_sibling_processes() -> bool:
    """Whether torchrun or ``srun`` has started several processes with the arguments of this one."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"]) > 1
    return started_by_srun() and int(os.environ.get("SLURM_NTASKS", 1)) > 1


def restarts() -> int:
    """How often SLURM has requeued, or torchrun has restarted, the job that this process belongs to."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def meet_again() -> None:
    """After a restart by torchrun, let the processes meet at a port of rank 0.

    In torchrun's own store they would find the addresses that the processes before them have left there, and wait for
    those: torch 2.13 keeps one store for all restarts.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not restarts():
        return
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # they do already
        return
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    told = _told_by_rank_zero(f"port of restart {restarts()}", port)
    os.environ.update({"MASTER_PORT": told, "TORCHELASTIC_USE_AGENT_STORE": "False"})


def _told_by_rank_zero(name: str, text: str) -> str:
    """A text of rank 0 in all processes of torchrun; what it was first told under that name stays."""
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    if os.environ["RANK"] == "0":
        store.compare_set(name, "", text)
    return store.get(name).decode()
