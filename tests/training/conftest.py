"""Training and sampling with the commands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdmodule.cli.main import predict_main, train_main


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
