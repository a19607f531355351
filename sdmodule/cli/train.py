"""The train command: data, callbacks, loggers, trainer, model, fit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sdmodule.cli.config_keys import side_effects
from sdmodule.cli.console import configured_loggers, echo, echo_device, is_rank_zero, report_interrupts
from sdmodule.cli.instantiate import build_trainer, instantiate
from sdmodule.cli.output_dir import output_dir_locked, prepare_output_dir, write_config
from sdmodule.cli.processes import restarts
from sdmodule.cli.sweep import FinishedJobs
from sdmodule.errors import check_bool, check_seed, count_of
from sdmodule.io.noted_warnings import noted_warnings
from sdmodule.io.redact import redact
from sdmodule.io.run_folder import set_aside_training


def train(cfg: DictConfig) -> None:
    """Fine-tune a model. Whatever cannot work is reported before anything is written."""
    with noted_warnings() as noted:
        trainer, model, data, output_dir = prepare(cfg)
    from sdmodule.callbacks.training_report import TrainingReport  # takes a while, and prepare() may fail before

    for callback in trainer.callbacks:
        if isinstance(callback, TrainingReport):
            callback.warnings += noted
    with output_dir_locked(output_dir):
        fit(cfg, trainer, model, data, output_dir)


def prepare(cfg: DictConfig) -> tuple[Any, Any, Any, Path]:
    """The trainer, the model, the data and the output folder; what cannot work with them is an error."""
    from sdmodule.callbacks.export import Export
    from sdmodule.cli.preflight import check_compatible
    from sdmodule.training.resume import FinishTraining, check_fits, find_checkpoint

    check_seed("seed", cfg.seed)
    check_bool("validate_first", cfg.validate_first)
    if restarts() and cfg.ckpt_path is None:
        cfg.ckpt_path = "auto"
    output_dir = prepare_output_dir(cfg)
    check_family(cfg)
    model = None
    if cfg.resolution is None and cfg.data.get("resolution", 0) is None:
        model = build_model(cfg)
        cfg.resolution = model.resolution
    data = instantiate(cfg.data)
    data.setup("fit")
    trainer = build_trainer(cfg)
    if (steps := steps_of_epochs(trainer, data)) is not None:
        cfg.trainer.max_steps = steps
        trainer = build_trainer(cfg)
    exports = [callback for callback in trainer.callbacks if isinstance(callback, Export)]  # type: ignore[attr-defined]
    exported = all(export.holds(trainer.max_steps) for export in exports)
    cfg.ckpt_path = find_checkpoint(cfg.ckpt_path, output_dir, trainer.max_steps, exported)
    if cfg.ckpt_path:
        trainer.callbacks.insert(0, FinishTraining(trainer.max_steps))  # type: ignore[attr-defined]
    model = model or build_model(cfg)
    model.trainer = trainer
    model.setup("fit")
    check_compatible(model, data, trainer.callbacks)  # type: ignore[attr-defined]
    if cfg.ckpt_path:
        check_fits(cfg.ckpt_path, model)
    return trainer, model, data, output_dir


def fit(cfg: DictConfig, trainer: Any, model: Any, data: Any, output_dir: Path) -> None:
    """Train, once nothing is left that could be wrong with the settings; from here on files are written."""
    from sdmodule.cli.summary import TrainingRecord, training_summary

    if is_rank_zero() and (earlier := set_aside_training(output_dir, cfg.ckpt_path)):
        echo(f"Moved what an earlier training left here to {', '.join(path.name for path in earlier)}")
    write_config(cfg, output_dir)
    announce(cfg, trainer, model, output_dir)
    trainer.callbacks.append(record := TrainingRecord())
    config = redact(OmegaConf.to_container(cfg, resolve=True))
    with report_interrupts(trainer, output_dir), configured_loggers(trainer, config, output_dir):
        if cfg.validate_first and cfg.ckpt_path is None:
            trainer.validate(model, datamodule=data, verbose=False)
        trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    for line in training_summary(cfg, trainer, model, data, record):
        echo(line)


def announce(cfg: DictConfig, trainer: Any, model: Any, output_dir: Path) -> None:
    """Say what the training computes on, what its settings set elsewhere, and how much it trains."""
    from sdmodule.speed.apply import training_attention
    from sdmodule.speed.tf32 import uses_tf32

    device = trainer.strategy.root_device.type
    attention = training_attention(device, str(trainer.precision))
    compiled = {"compile": cfg.training.compile} if "training" in cfg.model else {}
    echo_device(trainer, uses_tf32(device), attention=attention, **compiled)
    if restarts():
        echo(f"Restarted; {f'resuming from {cfg.ckpt_path}' if cfg.ckpt_path else 'no checkpoint yet, starting anew'}")
    if effects := side_effects(cfg, "tuning"):
        echo(effects)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    steps = count_of(trainer.max_steps, "step")
    echo(f"Training {trained:,} of {total:,} parameters for {steps}; writing to {output_dir}")


def summarize_trainings(finished_jobs: FinishedJobs) -> None:
    """Write the table and the page that compare the finished trainings of a sweep, in the folder of the sweep.

    Args:
        finished_jobs: output folder and overrides of each training.
    """
    from sdmodule.io.training_sweep_report import summarize_trainings as summarize

    if is_rank_zero():
        folder = finished_jobs[0][0].parent
        summarize(folder, finished_jobs)
        echo(f"Wrote {folder / 'summary.csv'} and {folder / 'index.html'}")


def steps_of_epochs(trainer: Any, data: Any) -> int | None:
    """Optimizer steps of ``trainer.max_epochs``, if they are fewer than its ``max_steps``; otherwise None."""
    if trainer.max_epochs in (None, -1):
        return None
    data.trainer = trainer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they follow when the training loads its data
        batches = len(data.train_dataloader())
    steps = trainer.max_epochs * -(-batches // trainer.accumulate_grad_batches)
    return steps if steps < trainer.max_steps else None


def check_family(cfg: DictConfig) -> None:
    """Check that a checkpoint is of a family that is known, before anything is read of it but its index."""
    from sdmodule.components.checkpoint import family_of

    pretrained = cfg.model.get("pretrained")
    if "components" in cfg.model and isinstance(pretrained, str):  # an autoencoder is of no family
        family_of(pretrained, cfg.model.get("revision"))


def build_model(cfg: DictConfig) -> Any:
    """The model to train, its new weights drawn from ``seed``."""
    from lightning import seed_everything

    seed_everything(cfg.seed % 2**32, workers=True, verbose=False)  # numpy takes 32 bits
    return instantiate(cfg.model)
