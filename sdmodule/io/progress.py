"""Progress bars in a terminal, and lines of progress elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from tqdm import tqdm


@contextmanager
def denoising_bar(total: int, show: bool = True) -> Iterator[Callable[[int, Tensor], None]]:
    """A progress bar of denoising steps, shown only in a terminal; yields the function to call after each step."""
    visible = show and sys.stderr.isatty()
    with tqdm(total=total, desc="denoising", unit="step", leave=False, disable=not visible) as bar:

        def on_step(done: int, latents: Tensor) -> None:
            bar.update(done - bar.n)

        yield on_step


@contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show the progress of a long task; yields the function to call with the number of items just done.

    In a terminal it is a bar, elsewhere a line at the start and at every tenth. Only rank 0 shows it, for its own
    share.

    Args:
        total: number of items.
        what: the task, for the bar or line.
    """
    first = getattr(rank_zero_only, "rank", 0) == 0
    visible = first and sys.stderr.isatty()
    done = 0
    if first and not visible:
        print(f"{what}: {total:,}", flush=True)
    with tqdm(total=total, desc=what, leave=False, disable=not visible) as bar:

        def on_done(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            bar.update(count)
            if first and not visible and done * 10 // total > before * 10 // total:
                print(f"{what}: {done:,} of {total:,}", flush=True)

        yield on_done
