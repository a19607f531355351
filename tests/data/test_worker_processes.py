"""How batches are loaded for each device."""

from types import SimpleNamespace

import pytest
import torch

from sdmodule.data import worker_processes
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.data.worker_processes import loading_options


def on(device: str, devices: int = 1) -> SimpleNamespace:
    """What the loaders ask of a trainer."""
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(strategy=strategy, num_devices=devices)


@pytest.mark.parametrize(
    ("trainer", "asked", "batches", "workers"),
    [
        (on("cpu"), None, 100, 0),
        (None, None, 100, 0),
        (on("cpu"), 3, 100, 3),
        (on("cuda"), None, 100, 8),
        (on("cuda"), None, 2, 2),  # further ones would have nothing to load
        (on("cuda", 4), None, 100, 3),  # of 16 cores, 4 for each device, one of them for the training
        (on("cuda", 16), None, 100, 0),
        (on("cuda"), 0, 100, 0),
        (on("cuda"), 12, 100, 12),
    ],
)
def test_a_gpu_is_fed_from_pinned_memory_by_as_many_processes_as_there_are_cores(
    monkeypatch, trainer, asked, batches, workers
):
    monkeypatch.setattr(worker_processes.os, "sched_getaffinity", lambda process: set(range(16)))
    gpu = trainer is not None and trainer.strategy.root_device.type == "cuda"
    assert loading_options(asked, trainer, batches) == {"num_workers": workers, "pin_memory": gpu}


def test_by_default_a_cpu_loads_as_before():
    loader = ShapesDataModule(batch_size=2, train_length=4).train_dataloader()
    assert (loader.num_workers, loader.pin_memory, loader.persistent_workers) == (0, False, False)
