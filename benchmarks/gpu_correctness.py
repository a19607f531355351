"""Section ``correctness`` of ``benchmarks/gpu.py``: what must be right before anything is measured."""

from __future__ import annotations

import os
import subprocess
import sys
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from benchmarks.gpu_run import GpuRun
from benchmarks.report import ROOT
from benchmarks.sampling_peers import PROMPT, pipeline
from benchmarks.training_peers import make_module
from sdmodule.cli.main import predict_main, train_main
from sdmodule.components.schedulers import make_scheduler
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.speed.speed_settings import ATTENTION

SCHEDULERS = ("ddim", "euler", "dpmpp_2m")

TUNINGS: dict[str, list[str]] = {
    "full": [],
    "lora": ["tuning=lora"],
    "textual_inversion": [
        "tuning=textual_inversion",
        "tuning.placeholder=<x>",
        "tuning.initializer=star",
        "data.prompt=<x>",
    ],
    "controlnet": ["tuning=controlnet"],
    "inpaint": ["model=inpaint", "training.inpaint.convert=true"],
}

MERGING = ("none", "exact", "window")


def correctness(run: GpuRun) -> None:
    """Equal to diffusers; all attention backends; a step of every tuning; ``from=`` twice; DDP; the marked tests."""
    equal_to_diffusers(run)
    attention_backends(run)
    for name, overrides in TUNINGS.items():
        if run.fits(f"tuning {name}", 8):
            with run.attempt(f"tuning {name}"):
                train(run, name, *overrides)
                run.row(f"tuning {name}", passed=True)
    for merging in MERGING[1:2] if run.dry else MERGING:
        if run.fits(f"from= with tome={merging}", 8):
            with run.attempt(f"from= with tome={merging}"):
                sample_again(run, merging)
    if run.fits("ddp", 10):
        with run.attempt("ddp"):
            distributed(run)
    marked_tests(run)


def equal_to_diffusers(run: GpuRun) -> None:
    """Float32 images of ``speed=exact`` beside those of diffusers' pipeline, bit for bit."""
    module = StableDiffusionModule.from_pretrained("tiny").to(run.device)
    pipe = pipeline(module.parts)
    side = 64 // module.parts.pixels_per_latent
    noise = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    for name in SCHEDULERS:
        what, steps = f"equal to diffusers, {name}", 2 if run.dry else 10
        with run.attempt(what):
            options = {"num_inference_steps": steps, "guidance_scale": 3.0, "guidance_rescale": 0.0, "height": 64}
            prompts = [PROMPT] * 2
            ours = module.infer(
                prompts, **options, width=64, latents=noise, scheduler=name, return_type="tensor", show_progress=False
            )["samples"]
            pipe.scheduler = make_scheduler(name, module.parts.scheduler.config)
            theirs = pipe(prompts, **options, width=64, latents=noise.to(run.device), output_type="pt").images.cpu()
            run.row(what, passed=torch.equal(ours, theirs), largest_difference=float((ours - theirs).abs().max()))
    torch.set_float32_matmul_precision(before)


def attention_backends(run: GpuRun) -> None:
    """Two steps and decoding with each backend in each precision; a refusal in one sentence passes."""
    for precision in ("float32",) if run.dry else ("float32", "float16", "bfloat16"):
        module = make_module(run.model(precision))
        for name in ATTENTION:
            what = f"attention {name}, {precision}"
            if not run.fits(what, 2):
                return
            with run.attempt(what):
                try:
                    module.infer("", num_inference_steps=2, speed={"attention": name}, show_progress=False)
                    run.row(what, passed=True)
                except SettingsError as refusal:
                    run.row(what, passed=True, refused=str(refusal))


def train(run: GpuRun, name: str, *overrides: str) -> None:
    """Train the embedded model for a step through the command."""
    run.command(
        train_main,
        "data=emoji",
        "data.batch_size=2",
        "trainer.max_steps=1",
        "trainer.limit_val_batches=0",
        "validate_first=false",
        "callbacks=[]",
        f"output_dir={run.folder / name}",
        *overrides,
    )


def sample_again(run: GpuRun, merging: str) -> None:
    """Images that are made again from their PNG equal the first ones in every pixel."""
    folders = [run.folder / f"{merging}-{k}" for k in range(3)]
    common = ["callbacks=[predictions]"]
    first = [f"prompt={PROMPT}", f"steps={2 if run.dry else 20}", f"tome={merging}"]
    run.command(predict_main, *first, *common, f"output_dir={folders[0]}")
    image = sorted((folders[0] / "images").glob("*.png"))[0]
    for folder in folders[1:]:
        run.command(predict_main, f"from={image}", *common, f"output_dir={folder}")
    made = [sorted((folder / "images").glob("*.png"))[0] for folder in folders]
    pixels = [np.asarray(Image.open(file)) for file in made]
    different = [int((one != pixels[0]).sum()) for one in pixels[1:]]
    run.row(f"from= with tome={merging}", passed=not any(different), different_values=different)


def distributed(run: GpuRun) -> None:
    """A step of DDP on one card, by NCCL, or by Gloo on the CPU."""
    with patch.dict(os.environ):
        try:
            train(run, "ddp", "trainer=ddp", f"trainer.accelerator={run.trainer}", "trainer.devices=1")
            run.row("ddp", passed=True, backend=torch.distributed.get_backend())
        finally:
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def marked_tests(run: GpuRun) -> None:
    """The tests that need a GPU, in a process of their own."""
    if run.dry or not run.fits("tests -m gpu", 20):
        return
    files = [
        str(file) for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text(encoding="utf-8")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu", *files]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(run.left, 10))
    except subprocess.TimeoutExpired:
        run.row("tests -m gpu", skipped="did not end in time")
        return
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    bad = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    run.row("tests -m gpu", passed=done.returncode == 0, result=lines[-1], **({"bad": bad} if bad else {}))
