"""Jobs of SLURM that end before they are done, and are queued again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

REQUEUE_SIGNAL = signal.SIGUSR1
"""What ``sbatch --signal=SIGUSR1@120`` sends to all processes two minutes before the time is up."""

LAST_STEP = 2**32 - 17
"""The largest number of a step that ``srun`` starts; those above are the batch script and the like."""


def started_by_srun() -> bool:
    """Whether this process is one of a step of a SLURM job."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return "SLURM_JOB_ID" in os.environ and step.isdigit() and int(step) <= LAST_STEP


def end_for_requeue(number: int, frame: FrameType | None) -> None:
    """Handler of `REQUEUE_SIGNAL`: end the process, whose job is then queued again."""
    sys.exit(128 + number)


@contextmanager
def requeued_on_signal() -> Iterator[None]:
    """Within the block, `REQUEUE_SIGNAL` ends what runs, and SLURM is asked to queue the job again.

    Nothing changes outside a job that ``srun`` has started. A training saves a checkpoint first: `TrainingCheckpoint`
    takes the signal over from `end_for_requeue`.
    """
    if not started_by_srun():
        yield
        return
    before = signal.signal(REQUEUE_SIGNAL, end_for_requeue)
    try:
        yield
    except SystemExit as end:
        if end.code == 128 + REQUEUE_SIGNAL:
            requeue()
        raise
    finally:
        signal.signal(REQUEUE_SIGNAL, before)


def requeue() -> None:
    """Ask SLURM to queue this job again; the first of its processes does."""
    if os.environ.get("SLURM_PROCID", "0") != "0":
        return
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        reason = done.stderr.strip() if done.returncode else None
    except OSError as error:
        reason = str(error)
    told = f"was not queued again ({reason}); submit it once more" if reason is not None else "is queued again"
    print(f"SLURM job {job} {told}", file=sys.stderr, flush=True)
