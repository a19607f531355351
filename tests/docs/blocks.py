"""The code blocks of the documentation, found in its pages and run as a reader would run them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.forked import Command

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"),
    ROOT / "examples" / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if not {"_build", "generated", "examples"} & {*path.parts}),
]
"""Every page that people read, but for those that are generated."""

SHORT_TRAINING = (
    "trainer.max_steps=1",
    "trainer.val_check_interval=1",
    "trainer.accumulate_grad_batches=1",
    "validate_first=false",
    "++steps=2",
)
SHORT_SAMPLING = ("steps=2",)
"""Settings that follow those of the page, so that a command takes seconds; none changes what the page says of it."""


@dataclass
class Block:
    """A fenced block of a page.

    Attributes:
        page: the page.
        line: where it starts.
        language: what stands behind the fence.
        code: its lines.
        remark: the HTML comment right above it, such as ``not run: needs a GPU`` or ``fails``.
    """

    page: Path
    line: int
    language: str
    code: str
    remark: str

    @property
    def place(self) -> str:
        """The page and the line, for messages."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def find_blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page that have a language."""
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(r"^(?:<!-- ?([^>]*?) ?-->\n+)?^```(bash|python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [
        Block(page, text[: found.start(2)].count("\n") + 1, found[2], found[3], found[1] or "")
        for found in pattern.finditer(text)
    ]


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a block, each as its words; comments are left out."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def run_block(block: Block, workplace: Path, names: dict[str, Any]) -> str:
    """Run a block in the folder ``workplace`` and return what it printed.

    A block that is not run is checked: its settings are composed, its targets and extras exist.

    Args:
        block: of a page.
        workplace: the folder that stands for the reader's.
        names: of the page's Python blocks, which follow on one another.

    Raises:
        AssertionError: if a command ends with another status than the page says.
    """
    if block.language == "python":
        program = compile(block.code, block.place, "exec")
        if not block.remark.startswith("not run"):
            exec(program, names)
        return ""
    printed = ""
    for words in commands(block.code):
        status, output = run_command(words, workplace, block.remark)
        wanted = 1 if block.remark == "fails" else 0
        assert status == wanted, f"{shlex.join(words)} ended with status {status}:\n{output[-2000:]}"
        printed += output
    return printed


def run_command(words: list[str], workplace: Path, remark: str) -> tuple[int, str]:
    """Run one command, or check one that is not run; returns its status and what it printed."""
    while re.fullmatch(r"\w+=\S*", words[0]):  # a variable of the environment
        words = words[1:]
    program, *arguments = words
    if program.endswith("python") and arguments[0] in ("predict.py", "train.py"):
        return run_ours(arguments[0].removesuffix(".py"), arguments[1:], workplace, remark)
    if program in ("sdmodule-predict", "sdmodule-train", "sdmodule-evaluate"):
        return run_ours(program.removeprefix("sdmodule-"), arguments, workplace, remark)
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return int(not set(arguments) <= set(targets)), f"targets: {targets}"
    if program.endswith("pip"):
        wanted = re.findall(r"sdmodule\[(\w+)\]|\.\[(\w+)\]", " ".join(arguments))
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        return int(not {a or b for a, b in wanted} <= extras.keys()), f"extras: {list(extras)}"
    if remark.startswith("not run"):
        scripts = [word for word in words if word.endswith(".py")]
        return int(not all((ROOT / script).is_file() for script in scripts)), f"scripts: {scripts}"
    if program.endswith("python"):
        words = [sys.executable, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=workplace, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def run_ours(command: str, arguments: list[str], workplace: Path, remark: str) -> tuple[int, str]:
    """Run one of our commands in a process of its own, for a few steps; what fails is run as it stands."""
    if remark.startswith("not run"):
        if "-m" in arguments:  # the first job of a sweep
            arguments = [re.sub(r"^([\w.]+=[^,\[{'\"]+),.*", r"\1", word) for word in arguments if word != "-m"]
        arguments = [*arguments, "--cfg", "job"]
    elif remark == "fails":
        pass
    elif command == "train":
        arguments = [*arguments, *SHORT_TRAINING]
        if any(word.startswith("ckpt_path=") for word in arguments):
            arguments.append("trainer.max_steps=2")
        if any("dreambooth" in word for word in arguments):
            arguments.append("data.class_images=2")
    elif command == "evaluate":
        pass
    elif "--from" not in arguments or any(word.startswith("steps=") for word in arguments):
        if not {"--help", "--cfg"} & set(arguments):
            arguments = [*arguments, *SHORT_SAMPLING]
    log = workplace / ".log"
    return Command(command, *arguments, log=log, preparation=partial(os.chdir, workplace)).wait(timeout=300)
