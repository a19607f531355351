"""Write the trained model where other tools read it."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from safetensors import SafetensorError
from typing_extensions import override

from sdmodule.callbacks.ema import EMA
from sdmodule.errors import SettingsError
from sdmodule.io.atomic import atomic_replace_dir


class Export(Callback):
    """At the end of training, write a diffusers folder.

    ``training.json`` beside the parts says which weights they are and how long they were trained.

    Args:
        folder: where to write.
        dtype: ``float32`` or ``float16``, the type of the weights in the files.
        weights: ``ema`` for the averaged weights, if there are any; ``raw`` for those that were trained.

    Raises:
        SettingsError: for another dtype, and for other weights.
    """

    def __init__(self, folder: str | Path, dtype: str = "float32", weights: str = "ema") -> None:
        if weights not in ("ema", "raw"):
            raise SettingsError(f"callbacks.export.weights={weights} is not known; give ema or raw.")
        if dtype not in ("float32", "float16"):
            raise SettingsError(f"callbacks.export.dtype={dtype} is not allowed; give float32 or float16.")
        self.folder = Path(folder)
        self.dtype = dtype
        self.weights = weights

    def holds(self, step: int) -> bool:
        """Whether the folder has the export of a step."""
        try:
            return json.loads((self.folder / "training.json").read_text())["steps"] == step
        except (OSError, ValueError, KeyError, TypeError):
            return False

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        averages = (c for c in trainer.callbacks if isinstance(c, EMA))  # type: ignore[attr-defined]
        ema = next(averages, None) if self.weights == "ema" else None
        metadata = {
            "weights": "ema" if ema and ema.average else "raw",
            "steps": trainer.global_step,
            "dtype": self.dtype,
        }
        with ema.applied(pl_module) if ema else nullcontext():
            self._write(pl_module, metadata)
        for logger in trainer.loggers:
            if log_folder := getattr(logger, "log_folder", None):  # W&B's
                log_folder(self.folder, "export")

    def _write(self, module: LightningModule, metadata: dict[str, Any]) -> None:
        try:
            with atomic_replace_dir(self.folder) as folder:
                module.save_pretrained(folder, dtype=self.dtype)  # type: ignore[operator]
                (folder / "training.json").write_text(json.dumps(metadata, indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            raise SettingsError(
                f"callbacks.export.folder={self.folder} cannot be written ({error}); give a folder with room, and "
                "ckpt_path=last to go on from where the training stopped."
            ) from error
