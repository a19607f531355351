"""What was typed for a command, and all that the command takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

from sdmodule.cli.command_tree import CommandTree

OVERRIDE = re.compile(r"[^-=\s][^=]*=|~")
"""How a word begins that sets, chooses, adds or removes something."""


class TypedLine:
    """The command line of a command, for messages about it.

    Args:
        command: name of its primary configuration, ``train`` or ``predict``.
        arguments: what was typed after the name of the command.
    """

    def __init__(self, command: str, arguments: Sequence[str]) -> None:
        self.command = command
        self.script = f"{command}.py"
        self.arguments = list(arguments)

    @cached_property
    def tree(self) -> CommandTree:
        """All that the command takes."""
        return CommandTree(self.command, self.arguments)

    def argument(self, key: str) -> str:
        """What was typed for a key, or the key alone where a file sets it."""
        return self.find(rf"^[+~]*{re.escape(key)}(?==|$)") or key

    def find(self, pattern: str) -> str:
        """The last argument that a pattern is found in, or an empty text."""
        return next((text for text in reversed(self.arguments) if re.search(pattern, text)), "")


def one_of(names: Sequence[str]) -> str:
    """Names in their order: ``a``, ``a or b``, ``a, b or c``."""
    return " or ".join(text for text in (", ".join(names[:-1]), *names[-1:]) if text)
