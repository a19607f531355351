"""Export the trained model at the end of training."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from safetensors import SafetensorError
from typing_extensions import override

from sdmodule.callbacks.ema import EMA
from sdmodule.errors import SettingsError, check_choice
from sdmodule.io.atomic import atomic_replace_dir
from sdmodule.training.sharding import whole_weights
from sdmodule.training.tuning import check_layout

DTYPES = ("float32", "float16")
WEIGHTS = ("ema", "raw")


class Export(Callback):
    """At the end of training, write what was trained in a form that diffusers loads.

    Its ``training.json`` holds which weights these are, their dtype and layout, and the number of training steps.

    Args:
        folder: folder to write.
        dtype: dtype of the weights in the files: ``float32`` or ``float16``.
        weights: ``ema`` for the averaged weights, if there are any; ``raw`` for the raw weights.
        layout: ``diffusers``; for whole models also ``single_file``, the original layout in one file.

    Raises:
        SettingsError: for an unknown dtype or unknown weights; in `check`, for a layout that is not that of the model.
    """

    def __init__(
        self, folder: str | Path, dtype: str = "float32", weights: str = "ema", layout: str = "diffusers"
    ) -> None:
        check_choice("callbacks.export.weights", weights, WEIGHTS)
        check_choice("callbacks.export.dtype", dtype, DTYPES)
        self.folder = Path(folder)
        self.dtype = dtype
        self.weights = weights
        self.layout = layout

    def check(self, model: Any) -> None:
        """Check that what is trained can be written in the layout.

        Raises:
            SettingsError: if it cannot.
        """
        check_layout(getattr(model, "tuning", model), self.layout, "callbacks.export.layout")

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check(pl_module)

    def holds(self, step: int) -> bool:
        """Whether the folder holds a finished export of a step, in this layout."""
        try:
            held = json.loads((self.folder / "training.json").read_text())
            return held["steps"] == step and held.get("layout", "diffusers") == self.layout
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        averages = (c for c in trainer.callbacks if isinstance(c, EMA))  # type: ignore[attr-defined]
        ema = next(averages, None) if self.weights == "ema" else None
        metadata = {
            "weights": "ema" if ema and ema.average else "raw",
            "steps": trainer.global_step,
            "dtype": self.dtype,
            "layout": self.layout,
        }
        here = trainer.is_global_zero
        with ema.applied(pl_module) if ema else nullcontext(), whole_weights(pl_module, here):
            if here:
                self._write(pl_module, metadata)
        for logger in trainer.loggers if here else ():
            if log_folder := getattr(logger, "log_folder", None):  # W&B's
                log_folder(self.folder, "export")

    def _write(self, module: LightningModule, metadata: dict[str, Any]) -> None:
        try:
            with atomic_replace_dir(self.folder) as folder:
                module.save_pretrained(folder, dtype=self.dtype, layout=self.layout)  # type: ignore[operator]
                (folder / "training.json").write_text(json.dumps(metadata, indent=2) + "\n")
        except (OSError, SafetensorError) as error:
            raise SettingsError(
                f"callbacks.export.folder={self.folder}: cannot be written ({error}); give a folder with enough space, "
                "and resume with ckpt_path=last."
            ) from error
