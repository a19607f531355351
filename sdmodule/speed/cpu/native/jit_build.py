"""C++ files compiled for this processor when they are first used, and cached for later processes."""

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
"""Flags of GNU compilers."""

HEADER = Path(__file__).with_name("processor.h")
"""Included by every file."""

TIMEOUT = 60.0
"""Seconds after which a compiler is killed; it usually takes one or two."""

DIGEST_SIZE = 32
"""Bytes of the digest that is appended to a cached library; the dynamic loader ignores them."""


@cache
def is_available(source: Path) -> bool:
    """Whether this machine can run a C++ file: Linux, a GNU compiler, and a processor with its instructions."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if not capabilities.get("avx512_bf16"):
        return False
    try:
        return bool(load_library(source).available())
    except (OSError, ValueError, subprocess.SubprocessError):
        return False


@cache
def load_library(source: Path) -> ctypes.CDLL:
    """The compiled library of a C++ file.

    It is cached in the folder of `autotune_cache_dir`, so that later processes need not compile.

    Raises:
        OSError: if there is no compiler, or the library cannot be loaded.
        ValueError: if the environment variable ``CXX`` is no command.
        SubprocessError: if it does not compile.
    """
    texts = (file.read_text(encoding="utf-8") for file in (source, HEADER))
    cached = autotune_cache_dir() / f"{fingerprint(*texts, *FLAGS, os.environ.get('CXX'))}.so"
    with suppress(OSError):
        if is_intact(cached):
            return ctypes.CDLL(str(cached))
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        built = compile_library(source, Path(folder))
        loaded = ctypes.CDLL(str(built))
        with suppress(OSError):
            cache_library(built, cached)
        return loaded


def compile_library(source: Path, folder: Path, *flags: str) -> Path:
    """Compile a C++ file into a shared library.

    Args:
        source: the file.
        folder: where to write the library.
        flags: compiler flags beside `FLAGS`.

    Raises:
        OSError: if there is no compiler; the environment variable ``CXX`` names another one than ``g++``.
        ValueError: if that is no command.
        SubprocessError: if it does not compile.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    compiled, linked = (folder / f"{source.stem}{suffix}" for suffix in (".o", ".so"))
    # linked without OpenMP, so that the process's symbols resolve to torch's OpenMP and its threads are shared
    for step in (
        [*FLAGS, *flags, "-c", str(source), "-o", str(compiled)],
        ["-shared", str(compiled), "-o", str(linked)],
    ):
        subprocess.run([*compiler, *step], check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT)
    return linked


def cache_library(built: Path, cached: Path) -> None:
    """Copy a library into the cache, with its digest appended."""
    cached.parent.mkdir(parents=True, exist_ok=True)
    content = built.read_bytes()
    with atomic_write(cached) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_bytes(content + digest(content))


def is_intact(cached: Path) -> bool:
    """Whether a cached library is undamaged and writable by this user only; a damaged one would crash the process."""
    status = cached.stat()
    content = cached.read_bytes()
    private = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return private and content[-DIGEST_SIZE:] == digest(content[:-DIGEST_SIZE])


def digest(content: bytes) -> bytes:
    """Hash of a library's content."""
    return hashlib.blake2b(content, digest_size=DIGEST_SIZE).digest()


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    """Address of a tensor's first element, for a C++ function."""
    return ctypes.c_void_p(tensor.data_ptr())
