"""An HTML page to browse a predict run."""

from __future__ import annotations

from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from typing_extensions import override

from sdmodule.io.html_report import Job, write_page


class HTMLReport(Callback):
    """At the end of a predict run, write ``index.html`` from its images, records and timings.

    Goes after `PredictionWriter` and `TimingLogger`, whose files it reads.

    Args:
        output_dir: folder of the run.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)

    @override
    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            write_page(self.output_dir, self.output_dir.absolute().name, [Job(self.output_dir)])
