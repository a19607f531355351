"""Steps of schedulers on a GPU that never wait for the host: noise is drawn ahead, coefficients stay on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from diffusers import LMSDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor
from torch.overrides import TorchFunctionMode

from sdmodule.diffusion.upload import upload

LARGEST_UPLOAD = 2**28
"""Bytes of noise that are uploaded at once: that of all steps, but for long runs of large batches."""


@contextmanager
def steps_on_device(
    scheduler: Any, device: torch.device, generators: Sequence[torch.Generator], steps: int
) -> Iterator[AbstractContextManager[Any]]:
    """Let a scheduler step latents on a GPU without copies from the host inside a ``with`` block; on a CPU do nothing.

    Most schedulers keep their coefficients on the CPU as scalars, which travel with the kernels that use them.

    Args:
        scheduler: a scheduler of diffusers at its first step.
        device: of the latents.
        generators: of the noise of all steps.
        steps: that the scheduler takes at most.

    Yields:
        A context to step in.
    """
    if device.type == "cpu":
        yield nullcontext()
        return
    if isinstance(scheduler, UniPCMultistepScheduler):  # copies coefficients at each step, if they are not there yet
        scheduler.sigmas = upload(scheduler.sigmas, device)
    if isinstance(scheduler, LMSDiscreteScheduler):  # integrates coefficients, which with tensors outlasts a UNet call
        scheduler.sigmas = scheduler.sigmas.tolist()
    noise = NoiseAhead([one for one in generators if one.device.type == "cpu"], device, steps)
    try:
        yield DeviceStep(noise)
    finally:
        noise.rewind()


class DeviceStep(TorchFunctionMode):
    """Replaces what waits in a scheduler's step: noise drawn on the CPU, and the check whether a system was singular.

    Args:
        noise: the noise of all steps.
    """

    def __init__(self, noise: NoiseAhead) -> None:
        super().__init__()
        self.noise = noise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The result of a function of torch."""
        kwargs = kwargs or {}
        if func is torch.randn and kwargs.get("generator") in self.noise.used:
            return self.noise.draw(tuple(args[0]), kwargs["generator"], kwargs.get("dtype"))
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **kwargs).result
        return func(*args, **kwargs)


class NoiseAhead:
    """Standard normal noise of CPU generators, drawn for many steps and uploaded at once.

    Each generator draws what it would draw step by step, and is left where it would be left.

    Args:
        generators: one for each image, or one for all.
        device: where the noise is needed.
        steps: at most that many times the noise of a step is drawn.
    """

    def __init__(self, generators: Sequence[torch.Generator], device: torch.device, steps: int) -> None:
        self.generators = list(generators)
        self.device = device
        self.left = steps
        self.drawn = torch.empty(0)  # [steps, generators, *shape]
        self.states: list[list[Tensor]] = []  # of each generator before each step
        self.used = {generator: 0 for generator in self.generators}

    def draw(self, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype | None) -> Tensor:
        """The next noise of a generator, of ``shape``, on the device."""
        rows = [row for row, one in enumerate(self.generators) if one is generator]
        step, turn = divmod(self.used[generator], len(rows))
        if step == len(self.drawn):
            self._draw_ahead(shape, dtype)
            step = 0
        self.used[generator] += 1
        return self.drawn[step, rows[turn]]

    def rewind(self) -> None:
        """Set each generator back to where it was before the noise that nobody asked for."""
        for generator, used in self.used.items():
            step = used // self.generators.count(generator)
            if step < len(self.states):
                generator.set_state(self.states[step][self.generators.index(generator)])

    def _draw_ahead(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
        dtype = dtype or torch.get_default_dtype()
        rows = len(self.generators)
        steps = min(max(self.left, 1), max(LARGEST_UPLOAD // (rows * math.prod(shape) * dtype.itemsize), 1))
        drawn = torch.empty(steps, rows, *shape, dtype=dtype)
        self.states = []
        for step in range(steps):
            self.states.append([generator.get_state() for generator in self.generators])
            for row, generator in enumerate(self.generators):
                torch.randn(shape, generator=generator, out=drawn[step, row])
        self.drawn = upload(drawn, self.device)
        self.used = dict.fromkeys(self.used, 0)
        self.left -= steps
