"""The two commands in processes of their own, forked from one that has already imported torch, Lightning and diffusers.

Starting Python and importing these libraries takes longer than most short runs. A `Command` is a real process that
runs the real entry point; it only skips the imports.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from pkgutil import iter_modules

import torch

SDMODULE = Path(__file__).parents[1] / "sdmodule"
ROOMS = ("callbacks", "cli", "data", "io", "training")
PRELOADED = ["benchmarks.forked", "sdmodule.module", "lightning", "wandb", "pytest", "psutil", "PIL.JpegImagePlugin"]
PRELOADED += ["hydra._internal.hydra", "hydra._internal.core_plugins.basic_sweeper", "torch.profiler"]
PRELOADED += [found.name for room in ROOMS for found in iter_modules([str(SDMODULE / room)], f"sdmodule.{room}.")]

PRELOADED.append("benchmarks.warm_start")

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(PRELOADED)


def enter(environment: Mapping[str, str], stdout: Path, stderr: Path) -> None:
    """Give the forked process its own environment and output, as a shell does."""
    for descriptor, path in ((1, stdout), (2, stderr)):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # the default of a process that was not forked
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run_command(
    command: str,
    arguments: list[str],
    environment: Mapping[str, str],
    stdout: Path,
    stderr: Path,
    preparation: Callable[[], None] | None,
) -> None:
    """Run the command in the forked process."""
    from lightning.pytorch.utilities import rank_zero_only

    from sdmodule.cli import main as cli

    enter(environment, stdout, stderr)
    rank = environment.get("SLURM_PROCID") or environment.get("LOCAL_RANK", 0)
    rank_zero_only.rank = int(rank)  # Lightning reads it when it is imported
    sys.argv = [command, *arguments]
    if preparation is not None:
        preparation()
    mains = {"train": cli.train_main, "predict": cli.predict_main, "evaluate": cli.evaluate_main, "pack": cli.pack_main}
    mains[command]()


def run_function(function: Callable[[], object], environment: Mapping[str, str], stdout: Path, stderr: Path) -> None:
    """Run the function in the forked process."""
    enter(environment, stdout, stderr)
    function()


class Command:
    """A running command; it starts when the object is made.

    Args:
        command: ``train``, ``predict``, ``evaluate`` or ``pack``.
        arguments: its command line.
        log: file of its output; emptied first.
        errors: file, or terminal, of its standard error, if that is to be apart from ``log``.
        environment: variables beside those of this process.
        preparation: called in the new process before the command.
    """

    def __init__(
        self,
        command: str,
        *arguments: object,
        log: Path,
        errors: Path | None = None,
        environment: Mapping[str, str] | None = None,
        preparation: Callable[[], None] | None = None,
    ) -> None:
        self.log = log
        log.write_text("")
        given = (command, list(map(str, arguments)), os.environ | (environment or {}), log, errors or log, preparation)
        self.process = FORKED.Process(target=run_command, args=given)
        self.process.start()

    def wait(self, timeout: float = 120.0) -> tuple[int, str]:
        """Wait for its end; returns its status, as a shell gives it, and its output."""
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} seconds: {self.log.read_text()}")
        return 128 - status if status < 0 else status, self.log.read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, or for the end of the command."""
        while self.process.is_alive() and not condition():
            time.sleep(0.005)

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def kill(self, condition: Callable[[], bool], after: float = 0.0) -> bool:
        """Kill it some seconds after a condition holds; False if it had ended by then."""
        self.wait_until(condition)
        self.process.join(after)
        alive = self.process.is_alive()
        self.process.kill()
        self.process.join()
        return alive


def run(command: str, *arguments: object, log: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run a command that must succeed; returns its output."""
    status, output = Command(command, *arguments, log=log, environment=environment).wait()
    assert status == 0, output
    return output


def output_of(function: Callable[[], object], log: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run a function in a process of its own that must succeed; returns what it prints."""
    log.write_text("")
    errors = log.with_name(f"{log.name}-errors")
    process = FORKED.Process(target=run_function, args=(function, os.environ | (environment or {}), log, errors))
    process.start()
    process.join()
    assert process.exitcode == 0, errors.read_text()
    return log.read_text()


def start_ranks(
    command: str,
    *arguments: object,
    log: Path,
    ranks: int = 2,
    strategy: str = "ddp",
    preparation: Callable[[], None] | None = None,
) -> list[Command]:
    """Start a command once for each rank, as a cluster's launcher does; ``log`` is that of rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = (*arguments, f"trainer.devices={ranks}", f"trainer.strategy={strategy}")
    started = {"SDMODULE_STARTED": time.strftime("%Y-%m-%d/%H-%M-%S"), "MASTER_PORT": port}
    logs = [log, *(log.with_name(f"{log.name}-{rank}") for rank in range(1, ranks))]
    return [
        Command(
            command,
            *arguments,
            log=one,
            environment={**started, "LOCAL_RANK": str(rank)},
            preparation=preparation,
        )
        for rank, one in enumerate(logs)
    ]


def run_ranks(command: str, *arguments: object, log: Path, ranks: int = 2, strategy: str = "ddp") -> str:
    """Run a command in processes that must all succeed; returns the output of rank 0."""
    ended = [one.wait() for one in start_ranks(command, *arguments, log=log, ranks=ranks, strategy=strategy)]
    assert [status for status, _ in ended] == [0] * ranks, ended
    return ended[0][1]


def finish_despite_kills(
    command: str,
    *arguments: object,
    log: Path,
    kills: int,
    longest: float,
    rng: random.Random,
    output: Path,
    progress: Callable[[], int] | None = None,
) -> None:
    """Kill a command at random moments, then let it finish.

    A process that finishes before its kill does not count: its output is removed, and the run starts over.

    Args:
        command: ``train`` or ``predict``.
        arguments: the command line of each process.
        log: file of the output.
        kills: number of processes that are killed.
        longest: seconds within which the kill comes, after some progress.
        rng: draws the moments.
        output: folder that the command writes.
        progress: grows as the work proceeds; without it the seconds are those since the start.
    """
    killed = 0
    while killed < kills:
        before = progress() if progress else 0
        one = Command(command, *arguments, log=log)
        if one.kill(lambda before=before: progress is None or progress() > before, rng.random() * longest):
            killed += 1
        else:
            shutil.rmtree(output, ignore_errors=True)
    run(command, *arguments, log=log)
