"""The report command: a page on one training, or on several side by side."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sdmodule.errors import SettingsError
from sdmodule.io.run_folder import PAGE
from sdmodule.io.training_report import is_training, short_names, write_training_page

MARK = "sdmodule training report"
"""What the pages say that this command may replace."""


def report_main() -> None:
    """Entry point of ``sdmodule-report`` and of ``python -m sdmodule.report``."""
    parser = argparse.ArgumentParser(
        "sdmodule-report",
        usage="%(prog)s RUN [RUN …] [--output FILE]",
        description="Write a page on a training, as index.html in its folder; or on several, side by side.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="folder of a training")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page; report.html by default for several runs")
    given = parser.parse_args()
    try:
        print(f"Wrote {report(given.runs, given.output)}", flush=True)
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def report(runs: Sequence[Path], output: Path | None = None) -> Path:
    """Write the page of trainings.

    Args:
        runs: their folders; one that is given twice is shown once.
        output: the page; if None, ``index.html`` in the folder of a single training, or ``report.html`` here.

    Returns:
        The page.

    Raises:
        SettingsError: for a folder without a training, a file that is no page of this kind, or one that cannot be
            written.
    """
    folders = list({run.expanduser().resolve(): run.expanduser() for run in runs}.values())
    for folder in folders:
        if not folder.is_dir():
            raise SettingsError(f"{folder}: is no folder; give the output_dir of a training.")
        if not is_training(folder):
            raise SettingsError(
                f"{folder}: holds no training, neither metrics.csv nor samples; give the output_dir of one."
            )
    page = output.expanduser() if output else folders[0] / PAGE if len(folders) == 1 else Path("report.html")
    names = short_names(folders)
    try:
        if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace"):
            raise SettingsError(f"--output {page}: is another file; give a name that is free.")
        write_training_page(page, " · ".join(names), dict(zip(names, folders, strict=True)))
    except OSError as error:
        raise SettingsError(f"--output {page}: cannot be written ({error.strerror}); give another.") from error
    return page
