"""Options, table and JSON that all benchmarks share; the JSON says how its figures were measured."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

import torch
from typing_extensions import override

from sdmodule.errors import SettingsError

PACKAGES = ("torch", "diffusers", "transformers", "lightning", "sdmodule")
"""Packages whose versions are recorded."""

ROOT = Path(__file__).resolve().parents[1]


class Parser(argparse.ArgumentParser):
    """An argument parser with ``--json`` and ``--quick`` that raises one sentence for a wrong argument.

    Args:
        description: what the benchmark measures.
        quick: what ``--quick`` shortens.
    """

    def __init__(self, description: str, quick: str) -> None:
        super().__init__(description=description, allow_abbrev=False)
        self.add_argument("--quick", action="store_true", help=f"a shortened run: {quick}")
        self.add_argument("--json", type=Path, help="file to write the results to")

    @override
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message[0].upper()}{message[1:]}.")


def check_counts(settings: argparse.Namespace, *names: str) -> None:
    """Check that options, or each value of options with several, are at least 1.

    Raises:
        SettingsError: if one is not.
    """
    for name in names:
        value = getattr(settings, name)
        least = min(value, default=1) if isinstance(value, list) else value
        if least < 1:
            raise SettingsError(f"--{name.replace('_', '-')} {least}: must be at least 1.")


def report(command: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The report of a benchmark, with what is needed to measure the same again.

    Args:
        command: the program and its arguments, as in ``sys.argv``.
        rows: the results.

    Returns:
        ``command`` (without absolute paths), ``date``, ``quick`` (whether the run was shortened), ``hardware``,
        ``versions`` and ``rows``, ready for JSON.
    """
    return {
        "command": command_line(command),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "quick": "--quick" in command,
        "hardware": hardware(),
        "versions": versions(),
        "rows": list(rows),
    }


def command_line(command: Sequence[str]) -> str:
    """A command that can be typed on another machine: absolute paths are cut down to their last part."""
    script = Path(command[0]).resolve()
    name = script.relative_to(ROOT).as_posix() if script.is_relative_to(ROOT) else script.name
    # An argument is a path or `key=path`.
    arguments = [re.sub(r"(^|=)[/~].*", lambda m: m[1] + Path(m[0]).name, argument) for argument in command[1:]]
    return shlex.join(["python", name, *arguments])


def hardware() -> dict[str, Any]:
    """Name of the processor, number of cores, memory in GiB, and name of the GPU (None without one)."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of :data:`PACKAGES`."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically, so that an interrupted run never leaves half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows in columns under their keys; a key that a row lacks leaves its cell empty."""
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [heads, *[[str(row.get(head, "")) for head in heads] for row in rows]]
    widths = [max(len(line[k]) for line in lines) for k in range(len(heads))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main(run: Callable[[Sequence[str]], Any]) -> None:
    """Run a benchmark with the arguments of the command line; a wrong one ends it with one sentence."""
    try:
        run(sys.argv[1:])
    except SettingsError as error:
        sys.exit(str(error))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    about = dict(reversed([(key.strip(), value.strip()) for key, _, value in (line.partition(":") for line in lines)]))
    if "model name" not in about:
        return platform.processor() or platform.machine()
    numbers = [f"{name} {about[key]}" for key, name in (("cpu family", "family"), ("model", "model")) if key in about]
    return ", ".join([about["model name"], *numbers])  # generations of one vendor may share a name
