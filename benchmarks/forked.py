"""Commands in processes of their own, forked from one that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    [
        "sdmodule.module",
        "sdmodule.training.autoencoder",
        "sdmodule.cli.main",
        "sdmodule.callbacks.export",
        "lightning",
        "wandb",
    ]
)


def work(command: str, arguments: list[str], said: str, preparation: Callable[[], None] | None) -> None:
    """What the process does: the command, its words in a file."""
    from sdmodule.cli import main as cli

    words = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as it is in a process that was not forked
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [command, *arguments]
    if preparation is not None:
        preparation()
    {"train": cli.train_main, "predict": cli.predict_main}[command]()


class Command:
    """A command at work; it begins when it is made."""

    def __init__(
        self, command: str, *arguments: object, said: Path, preparation: Callable[[], None] | None = None
    ) -> None:
        self.said = said
        said.write_text("")
        self.process = FORKED.Process(target=work, args=(command, list(map(str, arguments)), str(said), preparation))
        self.process.start()

    def ended(self, timeout: float = 120.0) -> tuple[int, str]:
        """Its status, as a shell tells it, and what it said."""
        self.process.join(timeout)
        status = self.process.exitcode
        if status is None:
            self.process.kill()
            raise AssertionError(f"still at work after {timeout} seconds: {self.said.read_text()}")
        return 128 - status if status < 0 else status, self.said.read_text()

    def send(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.process.pid, number)

    def killed(self, moment: Callable[[], bool], after: float = 0.0) -> bool:
        """Kill it some time after a moment has come; False if it had ended by then."""
        while self.process.is_alive() and not moment():
            time.sleep(0.002)
        self.process.join(after)
        alive = self.process.is_alive()
        self.process.kill()
        self.process.join()
        return alive


def run(command: str, *arguments: object, said: Path) -> str:
    """A command that ends well; what it said."""
    status, words = Command(command, *arguments, said=said).ended()
    assert status == 0, words
    return words


def finish_in_spite_of_kills(
    command: str,
    *arguments: object,
    said: Path,
    kills: int,
    longest: float,
    chance: random.Random,
    made: Path,
    progress: Callable[[], int] = int,
) -> None:
    """Kill a command at random moments, and then let it come to its end.

    Where it has come to its end before the kill, what it made is removed, and it begins anew.

    Args:
        command: ``train`` or ``predict``.
        arguments: with which each process starts.
        said: file of its words.
        kills: processes that are killed at their work.
        longest: seconds within which the kill comes, after some progress.
        chance: draws the moments.
        made: folder of what it makes.
        progress: grows as the work goes on; without it the seconds are those since the start.
    """
    done = 0
    while done < kills:
        before = progress()
        one = Command(command, *arguments, said=said)
        begun = (lambda: True) if progress is int else (lambda before=before: progress() > before)
        if one.killed(begun, chance.random() * longest):
            done += 1
        else:
            shutil.rmtree(made, ignore_errors=True)
    run(command, *arguments, said=said)
