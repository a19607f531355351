"""Training and sampling with the commands, and what a training step draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdmodule.cli.main import predict_main, train_main
from sdmodule.training.rng import per_example_generators

TWO_CAPTIONS = ["a red circle", "a blue star on a green background"]


@pytest.fixture
def train_export(call, checkpoint, photos) -> Callable[..., Path]:
    """Train three steps with ``train``; returns the export folder."""

    def train(out: Path, *settings: str) -> Path:
        command = [f"pretrained={checkpoint}", f"data.root={photos}", "data.val_fraction=0", "sampler.steps=2"]
        command += ["trainer.max_steps=3", f"output_dir={out}", "model.optimizer.lr=1e-2", "callbacks.ema.start_step=2"]
        status, _, error = call(train_main, *command, *settings)
        assert status == 0, error
        return out / "export"

    return train


@pytest.fixture
def sample_image(call, checkpoint) -> Callable[..., np.ndarray]:
    """Sample one image with ``predict``."""

    def sample(out: Path, *settings: str, prompt: str = "a red star") -> np.ndarray:
        command = [f"pretrained={checkpoint}", "steps=3", f"output_dir={out}", f"prompt={prompt}"]
        status, _, error = call(predict_main, *command, *settings)
        assert status == 0, error
        return np.asarray(Image.open(next((out / "images").iterdir())))

    return sample


@pytest.fixture
def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    images = {name: torch.rand((2, 3, 32, 32), generator=generator) for name in ("image", "conditioning")}
    return {"image": images["image"] * 2 - 1, "conditioning": images["conditioning"], "caption": TWO_CAPTIONS}


def drawn(generators: list[torch.Generator]) -> dict[str, Tensor]:
    """What a step draws for images of 32 pixels, in its order: latents, timestep, caption dropout, noise."""
    draws: dict[str, list[Tensor]] = {"latents": [], "timesteps": [], "noise": []}
    for generator in generators:
        draws["latents"].append(torch.randn(4, 8, 8, generator=generator))
        draws["timesteps"].append((torch.rand(1, generator=generator) * 1000).long())
        torch.rand((), generator=generator)
        draws["noise"].append(torch.randn(4, 8, 8, generator=generator))
    return {name: torch.cat(rows) if name == "timesteps" else torch.stack(rows) for name, rows in draws.items()}


@pytest.fixture
def draws() -> dict[str, Tensor]:
    """What the module draws at its first step."""
    return drawn(per_example_generators(0, 2, 0, None))
