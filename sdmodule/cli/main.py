"""The two commands: compose the configuration, build what it names, run, finish."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from sdmodule.cli.error_messages import report_composition_errors, report_user_errors
from sdmodule.cli.instantiate import build_trainer, instantiate
from sdmodule.cli.overrides import quote_overrides, with_png_settings
from sdmodule.cli.quiet import filter_library_messages
from sdmodule.cli.startup import gc_paused, gc_resume
from sdmodule.errors import unwritable
from sdmodule.io.atomic import atomic_write_text, remove_leftovers
from sdmodule.io.redact import redact
from sdmodule.ranges import check_flag, check_seed

if TYPE_CHECKING:
    from lightning import Trainer


def train(cfg: DictConfig) -> None:
    """Fine-tune a model: data, callbacks, loggers, trainer, model, fit."""
    from sdmodule.callbacks.export import Export
    from sdmodule.cli.preflight import check_compatible
    from sdmodule.training.resume import FinishTraining, check_fits, find_checkpoint

    check_seed("seed", cfg.seed)
    check_flag("validate_first", cfg.validate_first)
    output_dir = prepare_output_dir(cfg)
    model = None
    if cfg.resolution is None and cfg.data.get("resolution", 0) is None:
        model = build_model(cfg)
        cfg.resolution = model.resolution
    data = instantiate(cfg.data)
    data.setup("fit")  # a folder that cannot be used is told of before anything is written
    trainer = build_trainer(cfg)
    exports = [callback for callback in trainer.callbacks if isinstance(callback, Export)]  # type: ignore[attr-defined]
    ended = all(export.holds(trainer.max_steps) for export in exports)
    cfg.ckpt_path = find_checkpoint(cfg.ckpt_path, output_dir, trainer.max_steps, ended)
    if cfg.ckpt_path:
        trainer.callbacks.insert(0, FinishTraining(trainer.max_steps))  # type: ignore[attr-defined]
    model = model or build_model(cfg)
    model.trainer = trainer
    model.setup("fit")  # as is a model that cannot be trained like this
    check_compatible(model, data, trainer.callbacks)  # type: ignore[attr-defined]
    if cfg.ckpt_path:
        check_fits(cfg.ckpt_path, model, trainer)
    write_config(cfg, output_dir)
    config = redact(OmegaConf.to_container(cfg, resolve=True))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    echo(f"Training {trained:,} of {every:,} parameters for {trainer.max_steps:,} steps; writing to {output_dir}")
    with report_interrupts(trainer, output_dir), configured_loggers(trainer, config, output_dir):
        if cfg.validate_first and cfg.ckpt_path is None:
            trainer.validate(model, datamodule=data, verbose=False)
        trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    echo(f"Wrote {output_dir}")


def predict(cfg: DictConfig) -> None:
    """Sample images: requests, callbacks, loggers, trainer, model, predict."""
    from sdmodule.cli.resume_predict import find_finished
    from sdmodule.io.run_folder import set_aside

    check_flag("resume", cfg.resume)
    output_dir = prepare_output_dir(cfg)
    data = instantiate(cfg.data)
    trainer = build_trainer(cfg)
    model = instantiate(cfg.model)
    if cfg.resume:
        data.done = find_finished(output_dir, data.requests, model.describe() | {"precision": str(trainer.precision)})
        echo(f"Resuming: {len(data.done)} of {len(data.requests)} images are there")
    if effect := model.sampling.speed.effect:
        echo(effect)
    write_config(cfg, output_dir)
    if not cfg.resume and is_rank_zero() and (earlier := set_aside(output_dir)):
        echo(f"The images of an earlier run are in {earlier} now")
    config = redact(OmegaConf.to_container(cfg, resolve=True))
    with report_interrupts(trainer, output_dir), configured_loggers(trainer, config, output_dir):
        trainer.predict(model, datamodule=data, return_predictions=False)
    echo(f"Wrote {output_dir / 'grid.png'}")


def build_model(cfg: DictConfig) -> Any:
    """Build the model that is trained; what it draws as it is built comes from the seed."""
    from lightning import seed_everything

    seed_everything(cfg.seed, workers=True, verbose=False)
    return instantiate(cfg.model)


def prepare_output_dir(cfg: DictConfig) -> Path:
    """Settle the output folder, one for each job of a sweep, and check that it can be written; nothing is written yet.

    Raises:
        SettingsError: if it cannot.
    """
    hydra_config = HydraConfig.get()
    folder = Path(str(cfg.output_dir)).expanduser()
    if hydra_config.mode == RunMode.MULTIRUN:
        if "wandb" in (cfg.get("logger") or {}) and cfg.logger.wandb.group is None:
            cfg.logger.wandb.group = "/".join(folder.parts[-2:])  # the runs of a sweep belong together
        folder = folder / str(hydra_config.job.num)
    cfg.output_dir = str(folder)
    try:
        nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    except OSError as error:
        raise unwritable(folder, error.strerror) from error
    if not nearest.is_dir():
        raise unwritable(folder, f"{nearest} is a file")
    if not os.access(nearest, os.W_OK):
        raise unwritable(folder, f"no permission to write in {nearest}")
    return folder


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Make the output folder and write down what the run was asked for.

    Figures of an earlier run in the same folder are set aside, since the CSV logger would delete them.

    Raises:
        SettingsError: if the folder cannot be written.
    """
    if not is_rank_zero():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, *folder.glob("*/")):
            remove_leftovers(place)
        if (metrics := folder / "metrics.csv").exists():
            metrics.rename(folder / f"metrics-{len(list(folder.glob('metrics-*.csv'))) + 1}.csv")
        written = OmegaConf.create(redact(OmegaConf.to_container(cfg, resolve=False)))
        atomic_write_text(folder / "config.yaml", OmegaConf.to_yaml(written))
        if (sweep := folder.parent / "multirun.yaml").is_file() and HydraConfig.get().mode == RunMode.MULTIRUN:
            written = OmegaConf.create(redact(OmegaConf.to_container(OmegaConf.load(sweep), resolve=False)))
            atomic_write_text(sweep, OmegaConf.to_yaml(written))
    except OSError as error:
        raise unwritable(folder, error.strerror) from error


def echo(text: str) -> None:
    """Print a line, once for all devices."""
    if is_rank_zero():
        print(text, flush=True)


def is_rank_zero() -> bool:
    """Whether this process is the one that writes for all devices."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def report_interrupts(trainer: Trainer, output_dir: Path) -> Iterator[None]:
    """After Ctrl-C say how to go on, with status 130; after SIGTERM too, which a scheduler sends first, with 143.

    Training saves a checkpoint before it stops.
    """
    try:
        yield
    except SystemExit as end:
        if not trainer.interrupted:
            raise
        last = getattr(trainer.checkpoint_callback, "last_model_path", "")
        go_on = f"; resume with ckpt_path={last}" if last else ""
        print(f"interrupted: what is done is in {output_dir}{go_on}", file=sys.stderr)
        sys.exit(143 if end.code == 143 else 130)


@contextmanager
def configured_loggers(trainer: Trainer, config: dict[str, Any], output_dir: Path) -> Iterator[None]:
    """Tell the loggers the configuration, and close what the next job of a sweep must not inherit."""
    with ExitStack() as stack:
        if any("wandb" in type(logger).__name__.lower() for logger in trainer.loggers):
            from sdmodule.cli.wandb_logger import wandb_run

            stack.enter_context(wandb_run(output_dir))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)
            if is_rank_zero() and (location := getattr(logger, "whereabouts", str)()):
                echo(location)
        yield


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block at once: Lightning only notes it, and a prediction would go on to its end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(job: Callable[[DictConfig], None], config_name: str) -> None:
    """Run a command: arguments from the command line, one sentence for a wrong one."""
    arguments, full_error = sys.argv[1:], os.environ.get("HYDRA_FULL_ERROR", "")
    finished_jobs: list[tuple[Path, list[str]]] = []
    began: list[bool] = []

    def checked(cfg: DictConfig) -> None:
        began.append(True)
        # as they were given: the processes of other devices are started with these again
        sys.argv[1:] = arguments
        os.environ["HYDRA_FULL_ERROR"] = full_error
        filter_library_messages()
        from sdmodule.cli.resource_errors import report_resource_errors

        gc_resume()

        with report_user_errors(config_name), report_resource_errors(cfg), exit_on_sigterm():
            job(cfg)
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            finished_jobs.append((Path(cfg.output_dir), list(HydraConfig.get().overrides.task)))

    # the devices of a run and the jobs of a sweep share one folder
    os.environ.setdefault("SDMODULE_STARTED", time.strftime("%Y-%m-%d/%H-%M-%S"))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints its errors itself
    try:
        with report_user_errors(config_name, always=full_error != "1"):
            sys.argv[1:] = quote_overrides(arguments) if job is train else with_png_settings(arguments)
            with gc_paused(), report_composition_errors(lambda: not began):
                hydra.main(config_path="pkg://sdmodule.conf", config_name=config_name, version_base="1.3")(checked)()
    finally:
        if finished_jobs and job is predict:
            summarize_sweep(finished_jobs)
        sys.argv[1:] = arguments
        os.environ["HYDRA_FULL_ERROR"] = full_error


def summarize_sweep(finished_jobs: list[tuple[Path, list[str]]]) -> None:
    """Lay the jobs of a sweep that came to their end side by side, in the sweep's own folder."""
    from sdmodule.io.sweep_report import summarize

    if is_rank_zero():
        folder = finished_jobs[0][0].parent
        summarize(folder, finished_jobs)
        echo(f"Wrote {folder / 'index.html'}")


def train_main() -> None:
    """Entry point of ``sdmodule-train``."""
    run(train, "train")


def predict_main() -> None:
    """Entry point of ``sdmodule-predict``."""
    run(predict, "predict")
