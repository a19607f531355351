"""What was typed for a command, and all that the command takes."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery

from sdmodule.cli.command_tree import CommandTree

OVERRIDE = re.compile(r"[^-=\s][^=]*=|~")
"""How a word begins that sets, chooses, adds or removes something."""


class TypedLine:
    """The command line of a command, for messages about it.

    Args:
        command: name of its primary configuration: ``train``, ``predict``, ``evaluate`` or ``pack``.
        arguments: what was typed after the name of the command.
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        self.script = program(command)
        self.arguments = list(arguments)

    @cached_property
    def tree(self) -> CommandTree:
        """All that the command takes."""
        search_path = create_config_search_path("pkg://sdmodule.conf")
        if folder := self.config_dir:
            search_path.prepend("command-line", f"file://{folder.absolute()}", SearchPathQuery(provider="schema"))
        return CommandTree(self.command, self.arguments, loader=ConfigLoaderImpl(search_path))

    @property
    def config_dir(self) -> Path | None:
        """The folder of further configuration files that ``--config-dir`` names."""
        for word, following in zip(self.arguments, [*self.arguments[1:], ""], strict=True):
            if word.startswith("--config-dir=") or word in ("--config-dir", "-cd"):
                return Path(word.partition("=")[2] or following)
        return None

    def argument(self, key: str) -> str:
        """What was typed for a key, cut if it is long, or the key alone where a file sets it."""
        text = self.find(rf"^[+~]*{re.escape(key)}(?==|$)") or key
        return text if len(text) <= 100 else f"{text[:99]}…"

    def find(self, pattern: str) -> str:
        """The last argument that a pattern is found in, or an empty text."""
        return next((text for text in reversed(self.arguments) if re.search(pattern, text)), "")


def program(command: str) -> str:
    """The program of a command, by the name that this one was called by: ``predict.py`` or ``sdmodule-predict``."""
    if command == "pack":
        return "python -m sdmodule.data.pack"
    if Path(sys.argv[0]).name.startswith("sdmodule-"):
        return f"sdmodule-{command}"
    return f"python -m sdmodule.{command}" if command == "evaluate" else f"{command}.py"


def one_of(names: Sequence[str]) -> str:
    """Names in their order: ``a``, ``a or b``, ``a, b or c``."""
    return " or ".join(text for text in (", ".join(names[:-1]), *names[-1:]) if text)
