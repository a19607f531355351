"""Metrics of a training as ``metrics.csv``, readable whenever the process is killed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from typing_extensions import override

from sdmodule.cli.yaml_text import is_plain, to_yaml
from sdmodule.io.atomic import atomic_write


class AtomicCSVLogger(CSVLogger):
    """Lightning's `CSVLogger`, except that a file which is written again is replaced atomically.

    For a new column Lightning truncates ``metrics.csv`` and writes all rows again: a kill in between loses them.
    """

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = _AtomicWriter(self.log_dir)
        return self._experiment  # type: ignore[return-value]


class _AtomicWriter(ExperimentWriter):
    @override
    def log_hparams(self, params: dict[str, Any]) -> None:
        self.hparams.update(params)
        with atomic_write(Path(self.log_dir) / self.NAME_HPARAMS_FILE) as temporary:
            if is_plain(self.hparams):
                temporary.write_text(to_yaml(self.hparams), encoding="utf-8")
            else:
                save_hparams_to_yaml(str(temporary), self.hparams)

    @override
    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        file = Path(self.metrics_file_path)
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        with atomic_write(file) as temporary, temporary.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, fieldnames)
            writer.writeheader()
            writer.writerows(rows)
