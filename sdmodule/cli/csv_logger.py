"""Figures of a training as ``metrics.csv``, whole whenever the process is killed."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from typing_extensions import override

from sdmodule.io.atomic import atomic_write, atomic_write_text


class AtomicCSVLogger(CSVLogger):
    """Lightning's `CSVLogger`; a new column, for which the file is written anew, never leaves half of it."""

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _WholeWriter(self.log_dir)
        return self._experiment  # type: ignore[return-value]


class _WholeWriter(ExperimentWriter):
    @override
    def log_hparams(self, params: dict[str, Any]) -> None:
        self.hparams.update(params)
        with atomic_write(Path(self.log_dir) / self.NAME_HPARAMS_FILE) as aside:
            save_hparams_to_yaml(str(aside), self.hparams)

    @override
    def save(self) -> None:
        """Add the rows since the last time to the file, in one write; with a new column, write it anew."""
        if not self.metrics:
            return
        file = Path(self.metrics_file_path)
        rows: list[dict[str, Any]] = list(self.metrics)
        names = sorted({*self.metrics_keys, *(name for row in rows for name in row)})
        anew = names != self.metrics_keys or not file.is_file()
        if anew and file.is_file():
            with file.open(newline="", encoding="utf-8") as lines:
                rows = [*csv.DictReader(lines), *rows]
        text = io.StringIO()
        writer = csv.DictWriter(text, names)
        if anew:
            writer.writeheader()
        writer.writerows(rows)
        if anew:
            atomic_write_text(file, text.getvalue())
        else:
            with file.open("a", newline="", encoding="utf-8") as end:
                end.write(text.getvalue())
        self.metrics_keys = names
        self.metrics = []
