"""A plain Lightning script, without Hydra: data, a callback and a second module of its own.

The model is fine-tuned on squares of two colours, and a classifier that was trained on the same data grades its images.

Example::

    python examples/lightning_script.py
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sdmodule import StableDiffusionModule
from sdmodule.callbacks import EMA

COLORS = {"teal": (0.0, 0.5, 0.5), "maroon": (0.5, 0.0, 0.0)}


class Squares(LightningDataModule):
    """Teal and maroon squares; a batch holds what sdmodule asks for, ``image`` and ``caption``, and a label too."""

    def train_dataloader(self) -> DataLoader:
        """Batches of two squares on grey."""
        examples = []
        for k in range(16):
            label = k % 2
            color = torch.tensor(list(COLORS.values())[label])[:, None, None]
            image = torch.full((3, 64, 64), 0.5)
            image[:, 8 + k : 40 + k, 8:56] = color
            name = list(COLORS)[label]
            examples.append(
                {"image": image * 2 - 1, "caption": f"a {name} square on a gray background", "label": label}
            )
        return DataLoader(examples, batch_size=2)  # type: ignore[arg-type]


class Classifier(LightningModule):
    """Tells the two colours apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, len(COLORS)))

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[B, 2]`` of images ``[B, 3, H, W]`` in [-1, 1]."""
        return self.layers(images)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Cross-entropy of the labels."""
        return nn.functional.cross_entropy(self(batch["image"]), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, fast, for a problem this simple."""
        return torch.optim.Adam(self.parameters(), lr=0.1)


class LastLoss(Callback):
    """Keep the loss of the last step."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        """Called by Lightning after each step."""
        self.loss = float(outputs["loss"])


def share_recognized(classifier: Classifier, images: Sequence[Image.Image], labels: Sequence[int]) -> float:
    """The share of images that the classifier gives the right label."""
    pixels = [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(64, 64, 3) for image in images]
    batch = torch.stack(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        return float((classifier(batch).argmax(1) == torch.tensor(labels)).float().mean())


def main(steps: int = 60) -> None:
    """Train both modules on the same data, and let one grade the other."""
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    classifier, data = Classifier(), Squares()
    Trainer(max_steps=100, **quiet).fit(classifier, data)

    last_loss = LastLoss()
    sd = StableDiffusionModule(
        "tiny", tuning={"kind": "lora", "rank": 8}, optimizer=partial(torch.optim.AdamW, lr=2e-3)
    )
    Trainer(max_steps=steps, callbacks=[last_loss, EMA(decay=0.9)], **quiet).fit(sd, data)

    labels = [0, 1] * 2
    prompts = [f"a {list(COLORS)[label]} square on a gray background" for label in labels]
    images = sd.infer(prompts, num_inference_steps=20, seed=0)["samples"]
    print(
        f"loss {last_loss.loss:.4f}; {share_recognized(classifier, images, labels):.0%} of the images have their color"
    )


if __name__ == "__main__":
    main()
