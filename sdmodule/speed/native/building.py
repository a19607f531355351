"""Files of C++ compiled for the processor at hand when they are first asked for."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sdmodule.atomic import whole_file
from sdmodule.data.fingerprints import fingerprint
from sdmodule.speed.choices import choices_folder

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC")
"""GNU's."""

SHARED = Path(__file__).with_name("processor.h")
"""What all files include."""

LONGEST = 120.0
"""Seconds that compiling may take; it takes about one."""


@cache
def is_available(source: Path) -> bool:
    """Whether this machine has what a file holds: Linux, a GNU compiler, and a processor with what it needs."""
    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not told.get("avx512_bf16"):
        return False
    try:
        return bool(library(source).available())
    except (OSError, subprocess.SubprocessError):
        return False


@cache
def library(source: Path) -> ctypes.CDLL:
    """What a file of C++ holds.

    It is kept beside what `choices` has found out about this machine, so that only the first process compiles.

    Raises:
        OSError: if there is no compiler.
        SubprocessError: if it does not compile.
    """
    written = (file.read_text(encoding="utf-8") for file in (source, SHARED))
    kept = choices_folder() / f"{fingerprint(*written, *FLAGS)}.so"
    with suppress(OSError):
        return ctypes.CDLL(str(kept))
    with TemporaryDirectory() as folder:
        made = compiled(source, Path(folder))
        with suppress(OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(kept) as aside:
                shutil.copyfile(made, aside)
        return ctypes.CDLL(str(made))


def compiled(source: Path, folder: Path, *flags: str) -> Path:
    """Compile a file of C++ into a library.

    Args:
        source: the file.
        folder: where the library is put.
        flags: of the compiler, besides `FLAGS`.

    Raises:
        OSError: if there is no compiler; the environment's ``CXX`` names one other than ``g++``.
        SubprocessError: if it does not compile.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    half, whole = (folder / f"{source.stem}{kind}" for kind in (".o", ".so"))
    # not linked with OpenMP: in the process it finds that of torch, whose threads it shares
    for step in ([*FLAGS, *flags, "-c", str(source), "-o", str(half)], ["-shared", str(half), "-o", str(whole)]):
        subprocess.run([*compiler, *step], check=True, capture_output=True, timeout=LONGEST)
    return whole


def place(tensor: Tensor) -> ctypes.c_void_p:
    """Where a tensor's numbers begin, for a function of C++."""
    return ctypes.c_void_p(tensor.data_ptr())
