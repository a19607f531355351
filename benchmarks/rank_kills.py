"""Kill one process of a training on several, again and again, and compare what it resumes to with an undisturbed one.

Two processes share a training, without torchrun or SLURM to end the one when the other is gone. Each time one of them
is killed with SIGKILL, the first and the second by turns, at a moment that is drawn between the start and the end. The
other one must end within a minute, the newest checkpoint must be whole, and the training, started again with
``ckpt_path=auto``, must end like the undisturbed one, to the bit: weights, optimizer, average and export.

Example::

    python benchmarks/rank_kills.py --json rank_kills.json
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.forked import run_ranks, start_ranks
from benchmarks.report import Parser, check_counts, main, print_table, report, write_json
from benchmarks.soak import EMOJI, load_results, same
from sdmodule.training.checkpoint_io import is_intact

SETTINGS = [f"data.root={EMOJI}", "data.batch_size=1", "resolution=32", "trainer=cpu", "progress=false", "+steps=1"]
SETTINGS += ["callbacks=[checkpoint,ema,samples,export]", "callbacks.samples.num_prompts=1", "sampler=ddim"]
SETTINGS += ["trainer.val_check_interval=7", "callbacks.checkpoint.every_n_train_steps=3"]
BOUND = 60.0
"""Seconds within which the process that is left must end."""


class Kills:
    """Trainings of two processes, one of which is killed.

    Args:
        folder: folder to work in.
        rng: draws the moments.
        settings: of the training.
    """

    def __init__(self, folder: Path, rng: random.Random, settings: Sequence[str]) -> None:
        self.folder, self.rng, self.settings = folder, rng, list(settings)
        out = folder / "undisturbed"
        start = time.perf_counter()
        run_ranks("train", *self.settings, f"output_dir={out}", log=folder / "log")
        self.longest = time.perf_counter() - start
        self.undisturbed = load_results("train", out)

    def row(self, number: int) -> dict[str, Any]:
        """Kill one process, wait for the other, and resume."""
        out, killed = self.folder / f"killed-{number}", number % 2
        settings = [*self.settings, f"output_dir={out}", "ckpt_path=auto"]
        while True:
            ranks = start_ranks("train", *settings, log=self.folder / "log")
            moment = self.rng.random() * self.longest
            ranks[killed].wait_until((out / "config.yaml").is_file)
            ranks[killed].process.join(moment)
            if ranks[killed].process.is_alive():
                break
            for rank in ranks:
                rank.wait()
            shutil.rmtree(out)
            self.longest *= 0.8
        ranks[killed].process.kill()
        start = time.perf_counter()
        ranks[1 - killed].process.join(2 * BOUND)
        seconds = time.perf_counter() - start
        ended = not ranks[1 - killed].process.is_alive()
        ranks[1 - killed].process.kill()
        ranks[1 - killed].process.join()
        checkpoints = list((out / "checkpoints").glob("*.ckpt"))
        newest = max(checkpoints, key=lambda file: file.stat().st_mtime_ns, default=None)
        whole = sum(map(is_intact, checkpoints))
        step = torch.load(newest, weights_only=True)["global_step"] if newest and is_intact(newest) else None
        run_ranks("train", *settings, log=self.folder / "log")
        equal = same(load_results("train", out), self.undisturbed)
        return {
            "killed rank": killed,
            "after seconds": round(moment, 2),
            "seconds until the other ended": round(seconds, 1) if ended else None,
            "checkpoints": len(checkpoints),
            "whole": whole,
            "resumed at step": step or 0,
            "equal to undisturbed": equal,
        }


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Run the benchmark; returns its report."""
    parser = Parser(__doc__ or "", "one kill in a training of few steps")
    parser.add_argument("--kills", type=int, default=10, help="number of processes that are killed")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    settings = parser.parse_args(arguments)
    check_counts(settings, "kills")
    steps = 6 if settings.quick else 40
    with tempfile.TemporaryDirectory() as folder:
        kills = Kills(Path(folder), random.Random(settings.seed), [*SETTINGS, f"trainer.max_steps={steps}"])
        rows = []
        for number in range(1 if settings.quick else settings.kills):
            rows.append(kills.row(number))
            print(rows[-1], file=sys.stderr, flush=True)
    print_table(rows)
    result = report(["benchmarks/rank_kills.py", *arguments], rows)
    if settings.json:
        write_json(settings.json, result)
    return result


if __name__ == "__main__":
    main(run)
