"""The UNet compiled for sampling."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sdmodule.speed.compile import blocks_to_compile

BACKEND = "inductor"
"""What compiles."""

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Where torch keeps what it has compiled; its own choice is a temporary folder."""


@contextmanager
def compiled(unet: Any, whole: bool) -> Iterator[None]:
    """Compile a UNet, or its blocks, inside a ``with`` block.

    What was compiled is kept between runs in ``~/.cache/sdmodule/compiled``, unless ``TORCHINDUCTOR_CACHE_DIR`` says
    another folder. The first batch compiles, or reads what is kept; ``timings.json`` has it apart as the warm-up.

    Args:
        unet: a ``UNet2DConditionModel``.
        whole: compile it as one graph; otherwise each block by itself, of which those that are alike share one.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    os.environ.setdefault(CACHE, str(home / "sdmodule" / "compiled"))
    parts: list[nn.Module] = [unet] if whole else blocks_to_compile(unet)
    parts = [part for part in parts if part._compiled_call_impl is None]  # a training compiled the others
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 64)
    try:
        for part in parts:
            part.compile(dynamic=False, backend=BACKEND)
        yield
    finally:
        torch._dynamo.config.recompile_limit = limit
        for part in parts:
            part._compiled_call_impl = None
