"""The evaluate command: the images, the networks, the figures, their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from sdmodule.cli.console import echo
from sdmodule.errors import SettingsError, check_bool, check_int, check_path, check_seed, unwritable
from sdmodule.io.atomic import atomic_write_text
from sdmodule.io.html_report import Job, write_page
from sdmodule.io.run_folder import EVALUATION, RECORDS

if TYPE_CHECKING:
    import torch

    from sdmodule.evaluation.figures import Evaluation


def evaluate(cfg: DictConfig) -> None:
    """Score images. Whatever cannot work is reported before a network is loaded."""
    from sdmodule.evaluation import figures
    from sdmodule.evaluation.image_set import read_image_set
    from sdmodule.evaluation.inception import InceptionFeatures
    from sdmodule.evaluation.transformers_scorer import TransformersScorer

    check_bool("progress", cfg.progress)
    check_int("batch_size", cfg.batch_size)
    check_int("resamples", cfg.resamples, minimum=2)
    check_seed("seed", cfg.seed)
    check_path("output_dir", cfg.output_dir)
    device = find_device(str(cfg.device))
    images = read_image_set(cfg.run)
    against = None if cfg.against is None else read_image_set(cfg.against, "against")
    if cfg.inception is not None and against is None:
        raise SettingsError(f"inception={cfg.inception}: is for distances; give against=FOLDER too, or leave it out.")
    scorer = TransformersScorer(cfg.scorer, device)
    inception = None if cfg.inception is None else InceptionFeatures(cfg.inception, device)
    echo(f"On {device}: {len(images):,} images of {images.name}, scorer {scorer.name}")
    result = figures.evaluate(
        images,
        scorer,
        against,
        inception,
        batch_size=cfg.batch_size,
        resamples=cfg.resamples,
        seed=cfg.seed,
        device=device if device.type == "cuda" else "cpu",  # mps has no float64
        show_progress=cfg.progress,
    )
    for line in lines(result):
        echo(line)
    write(result, Path(str(cfg.output_dir)).expanduser())


def find_device(name: str) -> torch.device:
    """The device that a setting names.

    Raises:
        SettingsError: if there is none such.
    """
    import torch

    available = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    available += ["cuda"] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    if name == "auto":
        return torch.device(next(one for one in ("cuda", "mps", "cpu") if one in available))
    if name not in available:
        raise SettingsError(f"device={name}: there is no such device; choose one of auto, {', '.join(available)}.")
    return torch.device(name)


def lines(result: Evaluation) -> list[str]:
    """The figures as a table, and the notes."""
    rows = [
        f"  {name:<22}{figure.value:>10.4g}   [{figure.low:.4g}, {figure.high:.4g}]"
        for name, figure in result.metrics.items()
    ]
    return [f"  {'':<22}{'value':>10}   95% interval", *rows, *result.notes]


def write(result: Evaluation, folder: Path) -> None:
    """Write ``evaluation.json``, and the page of a run anew.

    Raises:
        SettingsError: if the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write_text(folder / EVALUATION, json.dumps(result.plain(), indent=2, ensure_ascii=False) + "\n")
        echo(f"Wrote {folder / EVALUATION}")
        if (folder / RECORDS).is_file():
            write_page(folder, folder.absolute().name, [Job(folder)])
            echo(f"Wrote {folder / 'index.html'}")
    except OSError as error:
        raise unwritable(folder, error.strerror) from error
