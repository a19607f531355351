"""The commands: read the arguments, compose the configuration, run the job once or once per job of a sweep."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from sdmodule.cli.about import version_line
from sdmodule.cli.arguments import check_words, full_name, without_topics
from sdmodule.cli.console import exit_on_sigterm
from sdmodule.cli.error_messages import report_composition_errors, report_resource_errors, report_user_errors
from sdmodule.cli.evaluate import evaluate
from sdmodule.cli.help_page import our_help
from sdmodule.cli.job_apart import job_apart
from sdmodule.cli.overrides import quote_overrides, with_png_settings
from sdmodule.cli.pack import pack
from sdmodule.cli.predict import predict, summarize_sweep
from sdmodule.cli.processes import meet_again, name_start
from sdmodule.cli.startup import composed_once, config_store_uncopied, filter_library_messages, gc_paused, gc_resume
from sdmodule.cli.sweep import FinishedJobs, Sweep, reporting_launchers, runs_apart
from sdmodule.cli.train import summarize_trainings, train
from sdmodule.cli.typed_line import TypedLine
from sdmodule.cli.unused_keys import check_used
from sdmodule.errors import SettingsError
from sdmodule.training.slurm import requeued_on_signal

COMMANDS = {"train": train, "predict": predict, "evaluate": evaluate}


def train_main() -> None:
    """Entry point of ``sdmodule-train``."""
    run(train, "train", quote_overrides, summarize_trainings)


def predict_main() -> None:
    """Entry point of ``sdmodule-predict``."""
    run(predict, "predict", with_png_settings, summarize_sweep)


def evaluate_main() -> None:
    """Entry point of ``sdmodule-evaluate`` and of ``python -m sdmodule.evaluate``."""
    run(evaluate, "evaluate", quote_overrides)


def run_rank(command: str) -> None:
    """Entry point of the processes for the further devices of a job in a sweep; its arguments are Hydra's overrides."""
    run(COMMANDS[command], command, list)


def pack_main() -> None:
    """Entry point of ``python -m sdmodule.data.pack``."""
    run(pack, "pack", quote_overrides)


def run(
    job: Callable[[DictConfig], None],
    config_name: str,
    read_arguments: Callable[[Sequence[str]], list[str]],
    after_sweep: Callable[[FinishedJobs], None] | None = None,
) -> None:
    """Run a command with the arguments of this process; bad input ends it with one sentence and exit status 1.

    Args:
        job: what to do with a composed configuration.
        config_name: primary configuration of the command.
        read_arguments: turns the arguments as typed into overrides that Hydra reads.
        after_sweep: called with the jobs of a sweep that finished.
    """
    arguments, full_error = sys.argv[1:], os.environ.get("HYDRA_FULL_ERROR", "")
    typed = TypedLine(config_name, arguments)
    if "--version" in map(full_name, arguments):
        with report_user_errors(typed):
            print(version_line(), flush=True)
        return
    name_start()
    meet_again()
    sweep = Sweep()
    composed = False

    def run_job(cfg: DictConfig) -> None:
        nonlocal composed
        composed = True
        restore()  # Lightning starts the processes of other devices with sys.argv
        filter_library_messages()
        gc_resume()
        apart = runs_apart()
        with (
            job_apart(cfg, sweep, typed) if apart else report_user_errors(typed),
            report_resource_errors(cfg),
            exit_on_sigterm(),
            requeued_on_signal(),
        ):
            check_used(cfg, HydraConfig.get().overrides.task)
            job(cfg)
        if HydraConfig.get().mode == RunMode.MULTIRUN and not apart:
            sweep.finished.append((Path(cfg.output_dir), list(HydraConfig.get().overrides.task)))

    def restore() -> None:
        sys.argv[:] = sweep.arguments
        os.environ["HYDRA_FULL_ERROR"] = full_error

    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints its errors itself
    try:
        with report_user_errors(typed, always=full_error != "1"):
            topics = check_words(typed)
            sys.argv[1:] = read_arguments(without_topics(arguments, topics))
            with (
                gc_paused(),
                our_help(topics),
                config_store_uncopied(),
                composed_once(arguments),
                reporting_launchers(sweep),
                report_composition_errors(typed, lambda: not (composed or sweep.launched)),
            ):
                hydra.main(config_path="pkg://sdmodule.conf", config_name=config_name, version_base="1.3")(run_job)()
            if not (composed or sweep.launched) and "--multirun" in map(full_name, arguments):
                raise SettingsError("-m: the sweep has no run; give values such as steps=10,20,50.")
            sys.stdout.flush()  # while an error of it can still be handled
    finally:
        if sweep.finished and after_sweep is not None:
            after_sweep(sweep.finished)
        restore()
