"""What a command says of a wrong input: one sentence, whoever found it."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from sdmodule.errors import SettingsError, unwritable


@contextmanager
def report_composition_errors(at_work: Callable[[], bool]) -> Iterator[None]:
    """Tell in a sentence what Hydra has no error of its own for: a folder of a sweep, a group of no text.

    Args:
        at_work: whether Hydra is still putting the settings together.

    Raises:
        SettingsError: instead of an error of another kind.
    """
    try:
        yield
    except (FileExistsError, NotADirectoryError, PermissionError) as error:  # Hydra makes a sweep's folder itself
        raise unwritable(Path(str(error.filename)), error.strerror) from error
    except (OSError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        if not at_work() or isinstance(error, (SettingsError, HydraException, OmegaConfBaseException)):
            raise
        raise SettingsError(
            f"these settings cannot be put together: {one_line(error)}; --cfg job shows all."
        ) from error


@contextmanager
def report_user_errors(config_name: str, always: bool = False) -> Iterator[None]:
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
    files = [resources.files("sdmodule.conf") / name for name in (f"{config_name}.yaml", "shared/commands.yaml")]
    source = "\n".join(file.read_text(encoding="utf-8") for file in files)
    keys = re.findall(r"^(?:  - )?(\w+):", source, re.MULTILINE)
    close = difflib.get_close_matches(unknown[1], keys, n=1, cutoff=0.5)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"there is no key {unknown[1]}; {meant}--cfg job shows all keys."


def one_line(error: BaseException) -> str:
    """An error's message without line breaks, and without the traceback of a process that loaded data.

    What a file from elsewhere has in it may be named there, so nothing is left that a terminal takes for a command.
    """
    line = " ".join(str(error).rpartition("SettingsError: ")[2].split())
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line)
