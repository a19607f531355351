"""Errors as a command reports them: one sentence on what is wrong and what to do, whoever raised it."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from sdmodule.cli.hydra_errors import explain
from sdmodule.cli.typed_line import TypedLine
from sdmodule.errors import SettingsError, unwritable

OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|ALLOC_FAILED")
UNTYPED = (OSError, ValueError, TypeError, AttributeError, KeyError, AssertionError, RecursionError, YAMLError)
"""Errors that Hydra lets pass, or raises itself, while it composes a configuration."""

RANK_LOST = re.compile(r"gloo.*(by peer|Broken pipe)|remote process exited|ncclRemoteError")
WORKER_DIED = re.compile(r"DataLoader worker \(pid")

PREDICT_MEMORY = (
    ("batch_size", 1, "batch_size={} to 1"),
    ("precision", "16-true", "precision={} to 16-true on a GPU"),
    ("height", None, "height and width"),
)
TRAIN_MEMORY = (
    ("data.batch_size", 1, "data.batch_size={} to 1, with trainer.accumulate_grad_batches as much larger"),
    ("trainer.precision", "16-mixed", "trainer.precision={} to 16-mixed on a GPU"),
    ("cache", "", "what is computed, with cache=latents"),
    ("resolution", None, "resolution={}"),
)
"""Settings that save memory, cheapest first: the key, the value that cannot be lowered, the advice."""


@contextmanager
def report_user_errors(typed: TypedLine, always: bool = False) -> Iterator[None]:
    """End the process with one sentence for bad input, exit status 1, and with 130 for Ctrl-C.

    Args:
        typed: what was typed.
        always: hide the traceback even if ``HYDRA_FULL_ERROR=1`` asks for it.
    """
    try:
        yield
    except (SettingsError, HydraException, OmegaConfBaseException) as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1" and not always:
            raise
        print(f"error: {sentence_of(error, typed)}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # whoever read the output has stopped, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def sentence_of(error: Exception, typed: TypedLine) -> str:
    """An error's message in one line: our own as it is, one of Hydra's in our words."""
    if isinstance(error, SettingsError):
        return one_line(error)
    try:
        known = explain(error, typed)
    except Exception:  # such as files of the user's that do not compose: a hint must not hide what went wrong
        known = None
    return printable(known) if known else one_line(error).partition(" Config search path:")[0]


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, and without the traceback of a worker process that raised it.

    The message may quote a file, so characters that a terminal would act on are replaced.
    """
    return printable(" ".join(str(error).rpartition("SettingsError: ")[2].split()))


def printable(text: str) -> str:
    """A text without characters that a terminal would act on."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


@contextmanager
def report_composition_errors(typed: TypedLine, is_composing: Callable[[], bool]) -> Iterator[None]:
    """Turn what goes wrong while Hydra composes the configuration into a sentence.

    Args:
        typed: what was typed.
        is_composing: whether Hydra is still composing.

    Raises:
        SettingsError: instead of an error that Hydra has no type for.
    """
    try:
        yield
    except BrokenPipeError:
        raise
    except (FileExistsError, NotADirectoryError, PermissionError) as error:  # Hydra makes a sweep's folder itself
        raise unwritable(Path(str(error.filename)), error.strerror) from error
    except UNTYPED as error:
        if not is_composing() or isinstance(error, (SettingsError, HydraException, OmegaConfBaseException)):
            raise
        other = f"these settings cannot be composed: {one_line(error)}; --help shows all keys."
        raise SettingsError(explain(error, typed) or other) from error


@contextmanager
def report_resource_errors(cfg: DictConfig) -> Iterator[None]:
    """Turn a lack of memory, disk space, access rights or other processes into a sentence that says what to do.

    Args:
        cfg: settings of the run, for the advice.

    Raises:
        SettingsError: instead of the error of torch or of the operating system.
    """
    import torch

    try:
        with _dead_workers_reported(cfg):
            yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or OUT_OF_MEMORY.search(str(error)):
            advice = ", then ".join(memory_advice(cfg))
            raise SettingsError(f"out of memory; lower, in this order: {advice}.") from error
        if RANK_LOST.search(str(error)):
            raise SettingsError(
                "another process of this run is gone; its own output may say why; resume with ckpt_path=auto."
            ) from error
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SettingsError(
                f"{error.filename or cfg.output_dir}: cannot be written ({error.strerror}); free some disk space or "
                "choose another output_dir; files written before are complete."
            ) from error
        if error.filename is None:
            raise
        raise SettingsError(
            f"{error.filename}: cannot be read or written ({error.strerror}); choose another path or change its "
            "permissions."
        ) from error


@contextmanager
def _dead_workers_reported(cfg: DictConfig) -> Iterator[None]:
    """Turn the death of a data loading process into a sentence.

    torch raises it from a signal handler, in the middle of whatever runs, which may turn it into another error.
    """
    try:
        yield
    except Exception as error:
        if not any(WORKER_DIED.search(str(one)) for one in _with_causes(error)):
            raise
        from sdmodule.data.worker_processes import default_workers

        workers = OmegaConf.select(cfg, "data.num_workers")
        raise SettingsError(
            "a data loading process died, probably out of memory; resume with ckpt_path=last and data.num_workers="
            f"{(default_workers() if workers is None else workers) // 2}."
        ) from error


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those while handling which it was raised; they may refer to one another in a circle."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def memory_advice(cfg: DictConfig) -> list[str]:
    """Settings to lower to save memory, cheapest first."""
    advice = []
    for key, lowest, text in TRAIN_MEMORY if "ckpt_path" in cfg else PREDICT_MEMORY:
        if key.partition(".")[0] not in cfg:
            continue
        value = OmegaConf.select(cfg, key)
        reduced = key.endswith("precision") and (value is None or "16" in str(value))  # None is 16 bits on a GPU
        cached = key == "cache" and "_target_" in (value or {})
        if (value == lowest and lowest is not None) or cached or reduced:
            continue
        advice.append(text.format(value))
    return advice
