"""The two commands: compose the configuration, build what it names, run, finish."""

from __future__ import annotations

import difflib
import logging
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from sdmodule.command_line import quoted, verbatim
from sdmodule.errors import SettingsError

if TYPE_CHECKING:
    from lightning import Trainer


def train(cfg: DictConfig) -> None:
    """Fine-tune a model: data, callbacks, loggers, trainer, model, fit."""
    from lightning import seed_everything

    from sdmodule.resume import find_checkpoint

    output_dir = choose_output(cfg)
    data = instantiate(cfg.data)
    data.setup("fit")  # a folder that cannot be used is told of before the model is loaded
    trainer = build_trainer(cfg)
    cfg.ckpt_path = find_checkpoint(cfg.ckpt_path, output_dir, trainer.max_steps)
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = instantiate(cfg.model)
    write_config(cfg, output_dir)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = sum(p.numel() for p in model.parameters())
    say(f"Training {trained:,} of {every:,} parameters for {trainer.max_steps:,} steps; writing to {output_dir}")
    with finishing(trainer, output_dir):
        trainer.fit(model, datamodule=data, ckpt_path=cfg.ckpt_path)
    say(f"Wrote {output_dir}")


def predict(cfg: DictConfig) -> None:
    """Sample pictures: requests, callbacks, loggers, trainer, model, predict."""
    output_dir = choose_output(cfg)
    data = instantiate(cfg.data)
    trainer = build_trainer(cfg)
    model = instantiate(cfg.model)
    write_config(cfg, output_dir)
    with finishing(trainer, output_dir), stopping_at_once():
        trainer.predict(model, datamodule=data, return_predictions=False)
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN and is_first_device():
        from sdmodule.sweep import add_job

        add_job(output_dir, hydra_config.job.num, hydra_config.overrides.task)
    say(f"Wrote {output_dir / 'grid.png'}")


def build_trainer(cfg: DictConfig) -> Trainer:
    """Build callbacks and loggers, and the trainer that has them; an entry that is null is left out."""
    callbacks = [callback for callback in instantiate(cfg.callbacks).values() if callback is not None]
    loggers = [logger for logger in instantiate(cfg.logger).values() if logger is not None]
    return instantiate(cfg.trainer, callbacks=callbacks, logger=loggers)


def instantiate(node: DictConfig, **extra: Any) -> Any:
    """Build what a node of the configuration names, with plain lists and dictionaries as arguments.

    Raises:
        SettingsError: for a value that is not given, and for settings that the target does not take.
    """
    try:
        settings = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        return hydra.utils.instantiate(verbatim(settings), **extra, _convert_="all")
    except MissingMandatoryValue as error:
        raise SettingsError(f"{error.full_key} is not given; add {error.full_key}=… to the command.") from error
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, SettingsError):
            cause = cause.__cause__
        if cause is None and isinstance(error.__cause__, (TypeError, ValueError, ImportError)):
            name = node._get_full_key(None)
            cause = SettingsError(f"{name}: these settings cannot be used: {one_line(error.__cause__)}")
        raise (cause or error) from error


def choose_output(cfg: DictConfig) -> Path:
    """Settle the output folder, one for each job of a sweep, and check that it can be written; nothing is written yet.

    Raises:
        SettingsError: if it cannot.
    """
    hydra_config = HydraConfig.get()
    folder = Path(str(cfg.output_dir)).expanduser()
    if hydra_config.mode == RunMode.MULTIRUN:
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


def unwritable(folder: Path, reason: str | None) -> SettingsError:
    """The error for an output folder that cannot be written."""
    return SettingsError(f"output_dir={folder} cannot be written ({reason}); give a folder that can be.")


def write_config(cfg: DictConfig, folder: Path) -> None:
    """Make the output folder and write down what the run was asked for.

    Figures of an earlier run in the same folder are set aside, since the CSV logger would delete them.

    Raises:
        SettingsError: if the folder cannot be written.
    """
    if not is_first_device():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (metrics := folder / "metrics.csv").exists():
            metrics.rename(folder / f"metrics-{len(list(folder.glob('metrics-*.csv'))) + 1}.csv")
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
    except OSError as error:
        raise unwritable(folder, error.strerror) from error


def say(text: str) -> None:
    """Print a line, once for all devices."""
    if is_first_device():
        print(text, flush=True)


def is_first_device() -> bool:
    """Whether this process is the one that writes for all devices."""
    from lightning.pytorch.utilities import rank_zero_only

    return getattr(rank_zero_only, "rank", 0) == 0


@contextmanager
def finishing(trainer: Trainer, output_dir: Path) -> Iterator[None]:
    """After Ctrl-C say how to go on, with status 130; after SIGTERM too, which a scheduler sends first, with 143.

    Training saves a checkpoint before it stops. What the next job of a sweep must not inherit is closed.
    """
    try:
        yield
    except SystemExit:
        if not trainer.interrupted:
            raise
        last = getattr(trainer.checkpoint_callback, "last_model_path", "")
        go_on = f"; resume with ckpt_path={last}" if last else ""
        print(f"interrupted: what is done is in {output_dir}{go_on}", file=sys.stderr)
        sys.exit(143 if trainer.received_sigterm else 130)
    finally:
        if "wandb" in sys.modules and (wandb_run := sys.modules["wandb"].run) is not None:
            wandb_run.finish()


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Let SIGTERM end the block at once: Lightning only notes it, and a prediction would go on to its end."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run(job: Callable[[DictConfig], None], config_name: str) -> None:
    """Run a command: arguments from the command line, one sentence for a wrong one."""
    arguments, full_error = sys.argv[1:], os.environ.get("HYDRA_FULL_ERROR", "")

    def checked(cfg: DictConfig) -> None:
        # as they were given: the processes of other devices are started with these again
        sys.argv[1:] = arguments
        os.environ["HYDRA_FULL_ERROR"] = full_error
        quiet()
        with one_sentence(config_name):
            job(cfg)

    # the devices of a run and the jobs of a sweep share one folder
    os.environ.setdefault("SDMODULE_STARTED", time.strftime("%Y-%m-%d/%H-%M-%S"))
    sys.argv[1:] = quoted(arguments)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints its errors itself
    try:
        with one_sentence(config_name, always=full_error != "1"):
            try:
                hydra.main(config_path="pkg://sdmodule.conf", config_name=config_name, version_base="1.3")(checked)()
            except (
                FileExistsError,
                NotADirectoryError,
                PermissionError,
            ) as error:  # Hydra makes a sweep's folder itself
                raise unwritable(Path(str(error.filename)), error.strerror) from error
    finally:
        sys.argv[1:] = arguments
        os.environ["HYDRA_FULL_ERROR"] = full_error


@contextmanager
def one_sentence(config_name: str, always: bool = False) -> Iterator[None]:
    """End the process with one sentence for a wrong input; with the traceback where HYDRA_FULL_ERROR=1 asks for it."""
    try:
        yield
    except (SettingsError, HydraException, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1" and not always:
            raise
        print(f"error: {explain(error, config_name)}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def explain(error: Exception, config_name: str) -> str:
    """Say in one line what was wrong; for an unknown key, which key was probably meant."""
    unknown = re.search(r"Could not override '([^']+)'", str(error))
    if unknown is None:
        return one_line(error).partition(" Config search path:")[0].removeprefix(f"In '{config_name}': ")
    source = (resources.files("sdmodule.conf") / f"{config_name}.yaml").read_text(encoding="utf-8")
    keys = re.findall(r"^(?:  - )?(\w+):", source, re.MULTILINE)
    close = difflib.get_close_matches(unknown[1], keys, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"there is no key {unknown[1]}; {meant}--cfg job shows all keys."


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, and without the traceback of a process that loaded data."""
    return " ".join(str(error).rpartition("SettingsError: ")[2].split())


def quiet() -> None:
    """Keep messages that nobody can act on out of the terminal."""
    import diffusers
    import transformers
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    for name in ("huggingface_hub", "hydra"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # the package that is imported last of these lends its logger to all of them
    for package in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        for module in ("utilities.rank_zero", "utilities.distributed", "trainer.connectors.signal_connector"):
            logging.getLogger(f"{package}.{module}").addFilter(worth_reading)

    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for category in (PossibleUserWarning, DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    for part in (r"module\(s\) in eval mode", "exists and is not empty", "functools.lru_cache", "dirpath has changed"):
        warnings.filterwarnings("ignore", message=f".*{part}.*")


def worth_reading(record: logging.LogRecord) -> bool:
    """Whether a line is more than Lightning's news of what it found on the machine."""
    return record.levelno > logging.INFO or f"{os.sep}lightning{os.sep}" not in record.pathname


def train_main() -> None:
    """Entry point of ``sdmodule-train``."""
    run(train, "train")


def predict_main() -> None:
    """Entry point of ``sdmodule-predict``."""
    run(predict, "predict")
