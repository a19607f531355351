"""Measure the memory of each of two processes that train a LoRA of Stable Diffusion 1.5, with DDP and with FSDP2.

The networks have the real architecture and random weights. Two processes on the CPU take one step on one image of 64
pixels each, in float32, so that activations are small beside the weights. ``loading_gib`` is the most resident memory
of a process until its first step begins, ``step_gib`` from there to the end of the step; both include what torch and
Python need, ``before_gib``. ``state_mib`` is computed, not measured: the weights, gradients and optimizer state that a
process holds between two steps.

Example::

    python benchmarks/sharding.py --json benchmarks/results/sharding.json
    python benchmarks/sharding.py --quick
"""

from __future__ import annotations

import json
import os
import socket
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from typing_extensions import override

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.forked import FORKED, run_function
from benchmarks.report import Parser, main, print_table, report, write_json
from sdmodule.cli.trainer import make_trainer
from sdmodule.components.checkpoint import Components
from sdmodule.components.save import save_components
from sdmodule.components.shipped_configs import CONFIGS, load_clip_tokenizer
from sdmodule.components.source import ASSETS
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.module import StableDiffusionModule

PROCESSES = 2
STRATEGIES = ("ddp", "fsdp")
LORA = {"kind": "lora", "rank": 16}
SIZE = 64


def write_checkpoint(folder: Path, quick: bool) -> None:
    """Write a folder of the real architecture, its random weights in 16 bits; or a copy of the embedded one."""
    source = ASSETS / "tiny" if quick else CONFIGS / "sd1"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)  # 4 GB are never held in float32
    try:
        parts = Components(
            unet=UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(source / "unet")),
            vae=AutoencoderKL.from_config(AutoencoderKL.load_config(source / "vae")),
            text_encoder=CLIPTextModel(CLIPTextConfig.from_pretrained(source / "text_encoder")),
            tokenizer=CLIPTokenizer.from_pretrained(source / "tokenizer") if quick else load_clip_tokenizer(),
            scheduler=DDIMScheduler.from_pretrained(source / "scheduler"),
            source="random weights",
        )
    finally:
        torch.set_default_dtype(torch.float32)
    save_components(parts, folder, "bfloat16")


class PeakMemory(Callback):
    """Write what this process held, in GiB, to a JSON file (Linux)."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.before, self.loading = resident("VmRSS"), 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loading = resident("VmHWM")
        Path("/proc/self/clear_refs").write_text("5")

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {"before_gib": self.before, "loading_gib": self.loading, "step_gib": resident("VmHWM")}
        self.file.write_text(json.dumps(found | {"state_mib": state_size(trainer, pl_module)}))


def resident(figure: str) -> float:
    """Resident memory of this process in GiB: now (``VmRSS``), or its peak (``VmHWM``)."""
    return int(Path("/proc/self/status").read_text().split(f"{figure}:")[1].split()[0]) / 2**20


def state_size(trainer: Trainer, module: LightningModule) -> float:
    """MiB of the weights, gradients and optimizer state that this process holds between two steps."""
    weights = [getattr(weight, "_local_tensor", weight) for weight in module.parameters()]
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    gradients = [getattr(weight, "_local_tensor", weight) for weight in trained]
    states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
    tensors = [*weights, *gradients, *(getattr(value, "_local_tensor", value) for value in states)]
    return sum(one.nbytes for one in tensors if isinstance(one, torch.Tensor)) / 2**20


def train(strategy: str, folder: Path) -> None:
    """Take one step in this process, which is one of several."""
    rank = int(os.environ["LOCAL_RANK"])
    rank_zero_only.rank = rank
    peak = PeakMemory(folder / f"{strategy}-{rank}.json")
    module = StableDiffusionModule(str(folder / "model"), tuning=LORA)
    trainer = make_trainer(
        accelerator="cpu",
        devices=PROCESSES,
        strategy=strategy,
        max_steps=1,
        callbacks=[peak],
        logger=False,
        limit_val_batches=0,
    )
    trainer.fit(module, ImageFolderDataModule(str(folder / "images"), SIZE, batch_size=1, val_fraction=0))


def measure(strategy: str, folder: Path) -> list[dict[str, Any]]:
    """A row for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(PROCESSES):
        log = folder / f"log-{rank}"
        environment = os.environ | {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_PORT": port}
        work = partial(train, strategy, folder)
        processes.append(FORKED.Process(target=run_function, args=(work, environment, log, log)))
        processes[-1].start()
    for rank, process in enumerate(processes):
        process.join()
        if process.exitcode:
            raise RuntimeError((folder / f"log-{rank}").read_text())
    rows = []
    for rank in range(PROCESSES):
        found = json.loads((folder / f"{strategy}-{rank}.json").read_text())
        rows.append({"strategy": strategy, "process": rank} | {name: round(value, 2) for name, value in found.items()})
    return rows


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Measure, print, write.

    Raises:
        SettingsError: an argument cannot be used.
    """
    parser = Parser("Measure the memory of processes that train together.", quick="the embedded model's architecture")
    settings = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_checkpoint(folder / "model", settings.quick)
        (folder / "images").mkdir()
        for k in range(PROCESSES):
            Image.new("RGB", (SIZE, SIZE), (100 * k, 90, 200)).save(folder / "images" / f"{k}.png")
            (folder / "images" / f"{k}.txt").write_text("a colour")
        for strategy in STRATEGIES:
            rows += measure(strategy, folder)
    print_table(rows)
    result = report([__file__, *arguments], rows)
    if settings.json:
        write_json(settings.json, result)
    return result


if __name__ == "__main__":
    main(run)
