"""Progress bars, where somebody can see them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor
from tqdm import tqdm


@contextmanager
def steps_bar(total: int, show: bool = True) -> Iterator[Callable[[int, Tensor], None]]:
    """A bar of denoising steps; yields what to call after each step. Draws nothing where output is no terminal."""
    visible = show and sys.stderr.isatty()
    with tqdm(total=total, desc="denoising", unit="step", leave=False, disable=not visible) as bar:

        def on_step(done: int, latents: Tensor) -> None:
            bar.update(done - bar.n)

        yield on_step
