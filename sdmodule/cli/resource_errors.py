"""What a machine runs out of in the middle of a run: memory, room on a disk, a process that read images."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf import DictConfig, OmegaConf

from sdmodule.errors import SettingsError

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED")
WORKER_DIED = re.compile(r"DataLoader worker \(pid")

PREDICT = (
    ("batch_size", 1, "batch_size={} to 1"),
    ("precision", "16-mixed", "precision={} to 16-mixed on a GPU"),
    ("height", None, "height and width"),
)
TRAIN = (
    ("data.batch_size", 1, "data.batch_size={} to 1, with trainer.accumulate_grad_batches as much larger"),
    ("trainer.precision", "16-mixed", "trainer.precision={} to 16-mixed on a GPU"),
    ("cache", "", "what is computed, with cache=latents"),
    ("resolution", None, "resolution={}"),
)
"""Settings that take memory, those whose loss is least first: the key, what it cannot be lowered from, the advice."""


@contextmanager
def report_resource_errors(cfg: DictConfig) -> Iterator[None]:
    """Turn errors that no setting is to blame for alone into a sentence that says what to do.

    Raises:
        SettingsError: instead of an error of memory, of room on a disk, or of a process that died.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or OUT_OF_MEMORY.search(str(error)):
            advice = ", then ".join(memory_advice(cfg))
            raise SettingsError(f"the memory does not suffice; lower, in this order: {advice}.") from error
        if WORKER_DIED.search(str(error)):
            raise SettingsError(
                "a process that reads images died, as it does where memory runs out; set data.num_workers="
                f"{max(0, OmegaConf.select(cfg, 'data.num_workers', default=0) // 2)}, and go on with ckpt_path=last."
            ) from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SettingsError(
                f"{error.filename or cfg.output_dir} cannot be written ({error.strerror}); make room, or give another "
                "output_dir; what was written before is whole."
            ) from error
        if error.filename is None:
            raise
        raise SettingsError(
            f"{error.filename} cannot be read or written ({error.strerror}); give another path, or see to its rights."
        ) from error


def memory_advice(cfg: DictConfig) -> list[str]:
    """Which settings to lower for less memory, those first that cost least."""
    advice = []
    for key, lowest, text in TRAIN if "ckpt_path" in cfg else PREDICT:
        value = OmegaConf.select(cfg, key)
        if (value == lowest and lowest is not None) or (key == "cache" and value):
            continue
        advice.append(text.format(value))
    return advice
