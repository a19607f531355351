"""The loop of diffusers' text-to-image training scripts, and this package's training, for comparison."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.optimization import get_scheduler
from lightning import Callback
from peft import LoraConfig
from PIL import Image

from sdmodule.callbacks.latent_cache import LatentCache
from sdmodule.callbacks.timing import TimingLogger
from sdmodule.cli.trainer import make_trainer
from sdmodule.components.checkpoint import Components
from sdmodule.components.schedulers import make_scheduler
from sdmodule.data.datamodule import ImageFolderDataModule
from sdmodule.module import StableDiffusionModule
from sdmodule.speed.compile import compile_unet
from sdmodule.training.frozen_weights import FrozenWeights

ADAPTER = LoraConfig(
    r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]
)
"""The adapter of diffusers' LoRA script."""

LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Task:
    """A training to measure.

    Attributes:
        folder: images with captions.
        size: image size in pixels.
        batch: batch size.
        lora: train an adapter instead of the whole UNet.
        precision: Lightning's name of the precision, ``bf16-mixed`` or ``32-true``.
        work: folder for temporary files.
    """

    folder: Path
    size: int
    batch: int
    lora: bool
    precision: str
    work: Path


def prepare_unet(unet: Any, lora: bool) -> None:
    """Make a new adapter trainable, or else the whole UNet."""
    unet.requires_grad_(not lora)
    if lora:
        unet.add_adapter(ADAPTER)


def make_data(task: Task) -> ImageFolderDataModule:
    """Datamodule of the images."""
    return ImageFolderDataModule(str(task.folder), resolution=task.size, batch_size=task.batch, val_fraction=0.0)


def script(parts: Components, task: Task, steps: int) -> list[float]:
    """Seconds of each step of the loop of diffusers' ``train_text_to_image.py`` and its LoRA variant.

    Images and captions are encoded and the loss is gathered at every step; gradients are clipped at 1; the optimizer is
    torch's AdamW with weight decay 0.01 and a constant learning rate. In mixed precision, frozen weights are in 16
    bits. ``parts.unet`` trains its trainable weights; frozen ones are restored afterwards.
    """
    frozen = [weight for weight in parts.unet.parameters() if not weight.requires_grad]
    float32 = [weight.data.cpu() for weight in frozen]
    try:
        if task.precision == "bf16-mixed":
            for weight in frozen:
                weight.data = weight.data.to(torch.bfloat16)
        return _script(parts, task, steps)
    finally:
        for weight, data in zip(frozen, float32, strict=True):
            weight.data = data.to(weight.device)


def _script(parts: Components, task: Task, steps: int) -> list[float]:
    parts.unet.set_attn_processor(AttnProcessor2_0())  # the defaults of a loaded checkpoint
    parts.text_encoder.set_attn_implementation("sdpa")
    mixed = "bf16" if task.precision == "bf16-mixed" else "no"
    AcceleratorState._reset_state(reset_partial_state=True)  # one process measures several precisions
    accelerator = Accelerator(mixed_precision=mixed, cpu=not torch.cuda.is_available())
    trained = [weight for weight in parts.unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=1e-2)
    data = make_data(task)
    data.setup("fit")
    prepared = accelerator.prepare(parts.unet, optimizer, data.train_dataloader(), get_scheduler("constant", optimizer))
    unet, optimizer, loader, schedule = prepared
    noising = make_scheduler("ddpm", parts.scheduler.config)
    dtype = torch.bfloat16 if mixed == "bf16" else torch.float32
    frozen = {name: getattr(parts, name).to(accelerator.device, dtype) for name in ("vae", "text_encoder")}
    unet.train()
    seconds: list[float] = []
    while True:
        start = time.perf_counter()
        for batch in loader:
            images = batch["image"].to(accelerator.device, dtype)
            latents = frozen["vae"].encode(images).latent_dist.sample() * parts.vae.config.scaling_factor
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, noising.config.num_train_timesteps, (len(latents),), device=latents.device)
            noisy = noising.add_noise(latents.float(), noise.float(), timesteps).to(dtype)
            tokens = parts.tokenizer(
                batch["caption"], padding="max_length", truncation=True, return_tensors="pt"
            ).input_ids
            text = frozen["text_encoder"](tokens.to(accelerator.device), return_dict=False)[0]
            predicted = unet(noisy, timesteps, text, return_dict=False)[0]
            loss = torch.nn.functional.mse_loss(predicted.float(), noise.float())
            accelerator.gather(loss.repeat(len(latents))).mean().item()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if accelerator.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            if len(seconds) == steps:
                return seconds
            start = time.perf_counter()


def ours(module: StableDiffusionModule, task: Task, steps: int) -> list[float]:
    """Seconds of each step of ``train.py cache=all``, without those of filling the cache."""
    timing = TimingLogger(task.work, warmup_steps=0, synchronize=True)
    train_ours(module, task, steps, [timing, LatentCache(task.work / "cache", "all")])
    return [step.seconds for step in timing.steps]


def train_ours(module: StableDiffusionModule, task: Task, steps: int, callbacks: Sequence[Callback]) -> None:
    """Train as ``train.py`` does, without validation."""
    trainer = make_trainer(
        "gpu" if torch.cuda.is_available() else "cpu",
        max_steps=steps,
        val_check_interval=steps,
        precision=task.precision,
        callbacks=callbacks,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        default_root_dir=task.work,
    )
    trainer.fit(module, make_data(task))


def make_module(parts: Components, compile: str = "none") -> StableDiffusionModule:
    """This package's module around loaded parts; ``compile`` is that of ``training.compile``."""
    module = StableDiffusionModule("tiny", optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=1e-2))
    module.parts, module.unet, module.vae, module.text_encoder = parts, parts.unet, parts.vae, parts.text_encoder
    module.frozen_weights = FrozenWeights.of(parts)
    compile_unet(module.unet, compile)
    return module


def write_images(folder: Path, count: int, size: int, captions: Sequence[str]) -> None:
    """Write random images with captions; speed does not depend on their content."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for k in range(count):
        values = torch.randint(0, 256, (size, size, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(values.numpy()).save(folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(captions[k % len(captions)])
