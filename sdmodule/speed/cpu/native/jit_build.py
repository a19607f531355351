"""Files of C++ compiled for the processor at hand when they are first asked for."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sdmodule.io.atomic import atomic_write
from sdmodule.io.fingerprint import fingerprint
from sdmodule.speed.cpu.autotune import autotune_cache_dir

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC")
"""GNU's."""

SHARED = Path(__file__).with_name("processor.h")
"""What all files include."""

LONGEST = 60.0
"""Seconds that compiling may take; it takes about one."""

DIGEST = 32
"""Bytes behind a library that is kept; the system's loader passes them over."""


@cache
def is_available(source: Path) -> bool:
    """Whether this machine has what a file holds: Linux, a GNU compiler, and a processor with what it needs."""
    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not told.get("avx512_bf16"):
        return False
    try:
        return bool(library(source).available())
    except (OSError, ValueError, subprocess.SubprocessError):
        return False


@cache
def library(source: Path) -> ctypes.CDLL:
    """What a file of C++ holds.

    It is kept beside what `choices` has found out about this machine, so that later processes need not compile.

    Raises:
        OSError: if there is no compiler, or what it made cannot be loaded.
        ValueError: if the environment's ``CXX`` is no command.
        SubprocessError: if it does not compile.
    """
    written = (file.read_text(encoding="utf-8") for file in (source, SHARED))
    kept = autotune_cache_dir() / f"{fingerprint(*written, *FLAGS, os.environ.get('CXX'))}.so"
    with suppress(OSError):
        if is_whole(kept):
            return ctypes.CDLL(str(kept))
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        made = compiled(source, Path(folder))
        loaded = ctypes.CDLL(str(made))
        with suppress(OSError):
            keep(made, kept)
        return loaded


def compiled(source: Path, folder: Path, *flags: str) -> Path:
    """Compile a file of C++ into a library.

    Args:
        source: the file.
        folder: where the library is put.
        flags: of the compiler, besides `FLAGS`.

    Raises:
        OSError: if there is no compiler; the environment's ``CXX`` names one other than ``g++``.
        ValueError: if that is no command.
        SubprocessError: if it does not compile.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    half, whole = (folder / f"{source.stem}{kind}" for kind in (".o", ".so"))
    # not linked with OpenMP: in the process it finds that of torch, whose threads it shares
    for step in ([*FLAGS, *flags, "-c", str(source), "-o", str(half)], ["-shared", str(half), "-o", str(whole)]):
        subprocess.run([*compiler, *step], check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=LONGEST)
    return whole


def keep(made: Path, kept: Path) -> None:
    """Copy a library to where later processes find it, with its digest behind it."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    content = made.read_bytes()
    with atomic_write(kept) as aside:
        aside.touch(mode=0o600)
        aside.write_bytes(content + digest(content))


def is_whole(kept: Path) -> bool:
    """Whether a library was written by `keep`, by this user alone: a damaged one would end the process."""
    about = kept.stat()
    content = kept.read_bytes()
    ours = about.st_uid == os.getuid() and not about.st_mode & 0o022
    return ours and content[-DIGEST:] == digest(content[:-DIGEST])


def digest(content: bytes) -> bytes:
    """What tells a content from any other."""
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def place(tensor: Tensor) -> ctypes.c_void_p:
    """Where a tensor's numbers begin, for a function of C++."""
    return ctypes.c_void_p(tensor.data_ptr())
