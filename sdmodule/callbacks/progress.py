"""The progress bar of training and sampling."""

from __future__ import annotations

import sys
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override


class ProgressBar(TQDMProgressBar):
    """Lightning's bar, and denoising steps inside it; neither where output is no terminal.

    Args:
        show: False draws no bar at all.
    """

    def __init__(self, show: bool = True) -> None:
        self.visible = show and sys.stderr.isatty()
        super().__init__(refresh_rate=1 if self.visible else 0)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        pl_module.show_progress = self.visible  # type: ignore[assignment]

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
