"""A fast and quiet start of a command: no garbage collection while importing, no noise from libraries."""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore

_frozen = False
"""Whether what was imported is exempt from garbage collection."""


@contextmanager
def gc_paused() -> Iterator[None]:
    """Turn garbage collection off within the block, or until `gc_resume` is called.

    Importing torch and diffusers makes a million objects and no garbage; scanning them took a fifth of the start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def gc_resume() -> None:
    """Turn garbage collection back on, without ever scanning what was imported so far.

    Only the first call of a process freezes objects, so that the next job of a sweep can free those of the one before.
    """
    global _frozen
    if not _frozen:
        gc.freeze()
        _frozen = True  # to count what is frozen takes 70 ms
    gc.enable()


@contextmanager
def config_store_uncopied() -> Iterator[None]:
    """Keep Hydra from copying its `ConfigStore` for each group that it looks at: half of the time that takes."""
    if "__deepcopy__" in vars(ConfigStore):  # within such a block
        yield
        return
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del ConfigStore.__deepcopy__  # type: ignore[attr-defined]


@contextmanager
def composed_once(arguments: Sequence[str]) -> Iterator[None]:
    """Keep Hydra from composing the configuration a first time only to see whether it sets ``hydra.mode``.

    That takes a quarter of a second. Ours does not set it; what the user has added might.
    """
    get_mode = Hydra.get_mode
    if not any("hydra.mode" in text or text.startswith(("-c", "--config")) for text in arguments):
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = get_mode  # type: ignore[method-assign]


def filter_library_messages() -> None:
    """Keep messages of libraries that nobody can act on out of the terminal."""
    for name in ("huggingface_hub", "hydra", "matplotlib"):  # matplotlib talks while torchmetrics imports it
        logging.getLogger(name).setLevel(logging.ERROR)

    import diffusers
    import transformers
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    transformers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.set_verbosity(logging.CRITICAL)  # it logs errors and raises them too: one is enough
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    # lightning and pytorch_lightning share one logger, under the name of whichever was imported last
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
        "was called before the ``update`` method",  # of metrics, where a signal ends a validation
        "overridden `transfer_batch_to_device`",  # ours serves any data module
        "Already found a `peft_config`",  # when a second adapter is added beside the first
    ):
        warnings.filterwarnings("ignore", message=f".*{part}.*")


def is_relevant(record: logging.LogRecord) -> bool:
    """Whether a log record is more than Lightning's notes on the machine (``GPU available: …``)."""
    return record.levelno > logging.INFO or f"{os.sep}lightning{os.sep}" not in record.pathname
