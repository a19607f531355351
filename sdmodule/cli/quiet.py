"""What libraries say that nobody can act on, kept out of the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def filter_library_messages() -> None:
    """Keep messages that nobody can act on out of the terminal."""
    import diffusers
    import transformers
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # its errors are raised as well, and then told of once
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    for name in ("huggingface_hub", "hydra"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # the package that is imported last of these lends its logger to all of them
    for package in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric"):
        for module in ("utilities.rank_zero", "utilities.distributed", "trainer.connectors.signal_connector"):
            logging.getLogger(f"{package}.{module}").addFilter(is_relevant)

    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    for category in (PossibleUserWarning, DeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    for part in (
        r"module\(s\) in eval mode",
        "exists and is not empty",
        "functools.lru_cache",
        "dirpath has changed",
        "infer the batch indices",
        "across ranks is zero",
        "Already found a `peft_config`",  # of the adapter before, beside which another one is put
    ):
        warnings.filterwarnings("ignore", message=f".*{part}.*")


def is_relevant(record: logging.LogRecord) -> bool:
    """Whether a line is more than Lightning's news of what it found on the machine."""
    return record.levelno > logging.INFO or f"{os.sep}lightning{os.sep}" not in record.pathname
