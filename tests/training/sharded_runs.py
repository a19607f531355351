"""Trainings one after another in each of several processes, under any strategy: to start a process takes longer."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from benchmarks.forked import FORKED, run_function
from sdmodule.callbacks.checkpoint import TrainingCheckpoint
from sdmodule.callbacks.ema import EMA
from sdmodule.callbacks.export import Export
from sdmodule.cli.trainer import make_trainer
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.module import StableDiffusionModule
from sdmodule.training.checkpoint_io import AtomicCheckpointIO

IMAGES_PER_STEP = 6
"""Of all processes, 1, 2 or 3."""


@dataclass(frozen=True)
class Run:
    """A training of a few steps, whose weights, average and optimizer state are in ``folder/last.ckpt`` at its end."""

    checkpoint: Path
    photos: Path
    folder: Path
    strategy: str = "auto"
    steps: int = 3
    resume: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Callback] = ()

    def train(self, devices: int = 1, nodes: int = 1) -> StableDiffusionModule:
        """Train in this process, which may be one of several."""
        # with a smaller eps, AdamW takes a step as large for a gradient of rounding errors, under any strategy
        optimizer = partial(torch.optim.AdamW, lr=1e-4, eps=1e-6)
        module = StableDiffusionModule(str(self.checkpoint), **{"optimizer": optimizer, **self.settings})
        options = {
            "batch_size": IMAGES_PER_STEP // (devices * nodes) or 1,
            "val_fraction": 0,
            "random_flip": True,
            **self.data,
        }
        data = ImageFolderDataModule(str(self.photos), 32, **options)
        every = TrainingCheckpoint(self.folder, filename="{step}", every_n_train_steps=2, save_last=True)
        trainer = make_trainer(
            accelerator="cpu",
            devices=devices,
            num_nodes=nodes,
            strategy=self.strategy,
            max_steps=self.steps,
            callbacks=[EMA(start_step=1), every, Export(self.folder / "export"), *self.callbacks],
            logger=False,
            gradient_clip_val=0.05,
            **self.trainer,
        )
        trainer.fit(module, datamodule=data, ckpt_path=self.resume, weights_only=True)
        return module

    @property
    def last(self) -> Path:
        """The last checkpoint."""
        return self.folder / "last.ckpt"

    def state(self) -> dict[str, Tensor]:
        """All tensors of the last checkpoint that a step changes."""
        held = AtomicCheckpointIO().load_checkpoint(self.last, weights_only=True)
        states = held["optimizer_states"][0]["state"]
        found = {f"weight {name}": value for name, value in held["state_dict"].items()}
        found |= {f"average {name}": value for name, value in held["callbacks"]["EMA"]["average"].items()}
        return found | {f"{kind} {number}": state[kind] for number, state in states.items() for kind in state}


def train_all(runs: Sequence[Run], devices: int, nodes: int) -> None:
    """Train, in one of several processes."""
    rank_zero_only.rank = devices * int(os.environ["NODE_RANK"]) + int(os.environ["LOCAL_RANK"])
    for one in runs:
        one.train(devices, nodes)


def train_in_processes(runs: Sequence[Run], devices: int, logs: Path, nodes: int = 1) -> None:
    """Train in processes of their own, on one machine or as if on several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(devices * nodes):
        log = logs / f"rank-{devices * nodes}-{rank}"
        own = {"LOCAL_RANK": str(rank % devices), "NODE_RANK": str(rank // devices), "MASTER_PORT": port}
        environment = os.environ | own
        processes.append(
            FORKED.Process(target=run_function, args=(partial(train_all, runs, devices, nodes), environment, log, log))
        )
        processes[-1].start()
    for process in processes:
        process.join(240)
        if process.exitcode is None:
            process.kill()
    failed = [(logs / f"rank-{devices * nodes}-{k}").read_text() for k, one in enumerate(processes) if one.exitcode]
    assert not failed, "\n".join(failed)


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, relative to its norm."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm().clamp(min=1e-12)) for name in ours)
