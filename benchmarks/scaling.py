"""Compute what training costs from one GPU to a thousand: memory for states, data sent per step, size of a checkpoint.

Nothing is measured: the weights of the real architectures are counted on torch's meta device, and the rest follows.
``P`` are trained weights, ``D`` frozen ones of the denoiser, ``F`` frozen ones of the other networks, ``n`` devices,
``k`` devices of a node, ``m`` nodes; a number in float32 has 4 bytes, one in 16 bits 2. Training is in ``bf16-mixed``
with AdamW and an average of the weights (EMA).

- States on a device: weights, gradients, two moments and the average of trained weights are ``20 P`` bytes, and frozen
  weights ``2 (D + F)``; ``ddp`` has a copy of the gradients, ``4 P``, beside them. ``fsdp`` shards the denoiser:
  ``(20 P + 2 D) / n + 2 F``; ``hsdp`` does so within a node, with ``k`` for ``n``. Activations come on top, and so do
  the weights of the blocks that are gathered at a time.
- Sent by a device per step: ``ddp`` reduces gradients, ``2 (n-1)/n 4P``. ``fsdp`` gathers the denoiser in 16 bits
  before the forward and again before the backward pass, ``2 (n-1)/n 2(P + D)``, and reduces gradients to their shards,
  ``(n-1)/n 4P``. ``hsdp`` does this within a node and sends ``2 (m-1)/m 4P/k`` to other nodes.
- A checkpoint holds weights, moments and the average of trained weights: ``16 P``.

Example::

    python benchmarks/scaling.py --json scaling.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sdmodule
from benchmarks.report import Parser, main, print_table, report, write_json
from sdmodule.training.lora import ATTENTION

CONFIGS = Path(sdmodule.__file__).parent / "components" / "assets" / "configs"

MODELS = {"Stable Diffusion 1.x": "sd1", "Stable Diffusion XL": "sdxl"}
"""Folders of configurations by the names of the models."""

ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}

RANK = 16

DEVICES = (1, 8, 64, 1024)
"""Devices of the rows; eight make a node."""

NODE = 8

GIB = 2**30


@dataclass(frozen=True)
class Weights:
    """Numbers of weights of a training.

    Attributes:
        name: the model and what is trained.
        trained: weights that are trained.
        denoiser: frozen weights of the denoiser.
        others: frozen weights of other networks.
    """

    name: str
    trained: int
    denoiser: int
    others: int


@dataclass(frozen=True)
class Costs:
    """What a strategy costs a device, in bytes.

    Attributes:
        states: weights, gradients, moments and average.
        within: sent per step to devices of the same node.
        between: sent per step to devices of other nodes.
    """

    states: float
    within: float
    between: float


def ring(devices: int, size: float) -> float:
    """Bytes that a device sends when ``size`` bytes are gathered, or reduced to shards, over a ring of devices."""
    return (devices - 1) / devices * size


def ddp(weights: Weights, devices: int) -> Costs:
    """A copy of the weights on each device; gradients are reduced."""
    sent = 2 * ring(devices, 4 * weights.trained)
    buffer = 4 * weights.trained if devices > 1 else 0
    states = 20 * weights.trained + buffer + 2 * (weights.denoiser + weights.others)
    return Costs(states, sent, 0) if devices <= NODE else Costs(states, 0, sent)


def fsdp(weights: Weights, devices: int) -> Costs:
    """A shard of the denoiser on each device; its weights are gathered twice, gradients reduced to their shards."""
    gathered = 2 * (weights.trained + weights.denoiser)
    sent = 2 * ring(devices, gathered) + ring(devices, 4 * weights.trained)
    states = (20 * weights.trained + 2 * weights.denoiser) / devices + 2 * weights.others
    return Costs(states, sent, 0) if devices <= NODE else Costs(states, 0, sent)


def hsdp(weights: Weights, devices: int) -> Costs:
    """Shards within a node; nodes reduce the gradients of their shards."""
    inside = fsdp(weights, NODE)
    return Costs(inside.states, inside.within, 2 * ring(devices // NODE, 4 * weights.trained / NODE))


def count(model: nn.Module) -> int:
    """Number of weights."""
    return sum(weight.numel() for weight in model.parameters())


def trainings(name: str, folder: Path) -> list[Weights]:
    """Weights of a full fine-tuning of the denoiser, and of a LoRA adapter on its attention."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        others = count(AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae")))
        for encoder, kind in ENCODERS.items():
            if (folder / encoder).is_dir():
                others += count(kind(CLIPTextConfig.from_pretrained(folder / encoder)))
        whole = count(unet)
        inject_adapter_in_model(LoraConfig(r=RANK, target_modules=list(ATTENTION)), unet)
    return [
        Weights(f"{name}, full", whole, 0, others),
        Weights(f"{name}, LoRA of rank {RANK}", count(unet) - whole, whole, others),
    ]


def row(weights: Weights, strategy: str, devices: int, costs: Costs) -> dict[str, Any]:
    """A row of the table."""
    return {
        "training": weights.name,
        "devices": devices,
        "strategy": strategy,
        "trained_weights": f"{weights.trained / 1e6:.1f} million",
        "states_gib": round(costs.states / GIB, 2),
        "sent_in_a_node_gib": round(costs.within / GIB, 2),
        "sent_between_nodes_gib": round(costs.between / GIB, 2),
        "checkpoint_gib": round(16 * weights.trained / GIB, 2),
    }


def rows(weights: Weights) -> list[dict[str, Any]]:
    """Rows of a training: each number of devices with each strategy that fits it."""
    found = []
    for devices in DEVICES:
        found.append(row(weights, "ddp" if devices > 1 else "auto", devices, ddp(weights, devices)))
        if devices > 1:
            found.append(row(weights, "fsdp", devices, fsdp(weights, devices)))
        if devices > NODE:
            found.append(row(weights, "hsdp", devices, hsdp(weights, devices)))
    return found


def run(arguments: Sequence[str]) -> dict[str, Any]:
    """Compute, print, and write the report that ``--json`` asks for."""
    parser = Parser("Compute what training costs on many devices.", quick="Stable Diffusion 1.x only")
    settings = parser.parse_args(arguments)
    models = {name: folder for name, folder in MODELS.items() if not settings.quick or folder == "sd1"}
    table = [
        line
        for name, folder in models.items()
        for weights in trainings(name, CONFIGS / folder)
        for line in rows(weights)
    ]
    print_table(table)
    result = report([__file__, *arguments], table)
    if settings.json:
        write_json(settings.json, result)
    return result


if __name__ == "__main__":
    main(run)
