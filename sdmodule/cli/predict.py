"""The predict command: requests, callbacks, loggers, trainer, model, predict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdmodule.cli.console import configured_loggers, echo, echo_device, is_rank_zero, report_interrupts
from sdmodule.cli.instantiate import build_trainer, instantiate
from sdmodule.cli.output_dir import output_dir_locked, prepare_output_dir, write_config
from sdmodule.cli.processes import restarts
from sdmodule.errors import check_bool
from sdmodule.io.redact import redact
from sdmodule.io.run_folder import set_aside_images


def predict(cfg: DictConfig) -> None:
    """Sample images. Whatever cannot work is reported before anything is written."""
    from sdmodule.cli.resume_predict import FinishedImages, SharedSearch
    from sdmodule.cli.summary import sampling_summary
    from sdmodule.cli.unknown_words import unknown_words
    from sdmodule.sampling.stages import work_ahead
    from sdmodule.sampling.text_conditions import check_texts
    from sdmodule.speed.tf32 import uses_tf32
    from sdmodule.training.strategies import check_strategy

    check_bool("resume", cfg.resume)
    cfg.resume = cfg.resume or restarts() > 0
    output_dir = prepare_output_dir(cfg)
    data = instantiate(cfg.data)
    trainer = build_trainer(cfg)
    check_strategy(trainer)
    model = instantiate(cfg.model)
    check_texts(model.parts, data.requests)
    metadata = model.describe() | {"precision": str(trainer.precision)}
    finished = FinishedImages(output_dir, data.requests, metadata) if cfg.resume else None
    if finished and trainer.world_size == 1:
        data.done = finished.find()
    there = sum(1 for _ in finished.files()) if finished and trainer.world_size > 1 else len(data.done)
    speed, device = model.sampling.speed, trainer.strategy.root_device.type
    work = work_ahead(model.parts, model.sampling, (len(data.requests) - there) / trainer.world_size)
    echo_device(trainer, uses_tf32(device, speed), attention=speed.attention, compile=speed.compile_on(device, work))
    if data.part:
        data.part = replace(data.part, settings=metadata | data.part.settings)
        echo(data.part.announcement)
    if speed.effect:
        echo(speed.effect)
    if unknown := unknown_words(model, data.requests):
        echo(unknown)

    def begin() -> None:
        """Write the first files, once nothing is left that could be wrong with the settings."""
        if cfg.resume:
            echo(f"Resuming: {len(data.done)} of {len(data.requests)} images are there")
        write_config(cfg, output_dir)
        if data.part and is_rank_zero():
            data.part.write(output_dir)

    with output_dir_locked(output_dir):
        if finished and trainer.world_size > 1:
            trainer.callbacks.append(SharedSearch(finished, data, begin))  # type: ignore[attr-defined]
        else:
            begin()
        sample(cfg, trainer, model, data, output_dir)
    for line in sampling_summary(trainer, data, output_dir):
        echo(line)


def sample(cfg: DictConfig, trainer: Any, model: Any, data: Any, output_dir: Path) -> None:
    """Sample; an earlier run in the folder is set aside first, unless it is resumed."""
    if not cfg.resume and is_rank_zero() and (earlier := set_aside_images(output_dir)):
        echo(f"Moved the images of an earlier run to {earlier}")
    config = redact(OmegaConf.to_container(cfg, resolve=True))
    with report_interrupts(trainer, output_dir), configured_loggers(trainer, config, output_dir):
        trainer.predict(model, datamodule=data, return_predictions=False)


def summarize_sweep(finished_jobs: list[tuple[Path, list[str]]]) -> None:
    """Write the page that compares the finished jobs of a sweep, in the folder of the sweep.

    Args:
        finished_jobs: output folder and overrides of each job.
    """
    from sdmodule.io.sweep_report import summarize

    if is_rank_zero():
        folder = finished_jobs[0][0].parent
        summarize(folder, finished_jobs)
        echo(f"Wrote {folder / 'index.html'}")
