"""CUDA tensors on a machine without a GPU, and a record of all that passes between host and device.

A tensor on the fake ``cuda:0`` computes on the CPU and has values. So what is sampled or trained equals the CPU's, and
no value has to be made up where a program reads one (``.item()``, a boolean mask), as ``FakeTensorMode`` would want.
Everything else is as strict as on a GPU: an operation on tensors of two devices raises.

Example:
    What crosses in the denoising loop after its first step::

        with fake_cuda() as cuda:
            module.to("cuda")
            marks = []
            module.infer("a star", callback_on_step_end=lambda step, latents: marks.append(len(cuda.crossings)))
            cuda.check(cuda.crossings[marks[0]:marks[-1]], allowed={"sampling/pipeline.py denoise_batch": "the reason"})

Whole trainings run on it too, from Lightning's ``Trainer(accelerator="gpu", devices=1)`` or the command with
``trainer=gpu``; a callback's ``on_train_batch_start`` takes the marks.

What it cannot do: run backward, which wants a real device, so that ``loss.backward()`` adds ones to the gradients
(`add_ones_to_gradients`); compile; capture a CUDA graph; choose an attention kernel; make a generator
on the device. Kernels of CUDA alone, and their rounding, are not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch

from tests.fake_cuda.crossing import Crossing
from tests.fake_cuda.driver import load_device_guard, replacements
from tests.fake_cuda.functions import FakeCudaFunctions, add_ones_to_gradients
from tests.fake_cuda.tensor import FakeCuda, FakeCudaTensor, values_of

__all__ = ["Crossing", "FakeCuda", "FakeCudaTensor", "add_ones_to_gradients", "fake_cuda", "values_of"]


@contextmanager
def fake_cuda(
    devices: int = 1, capability: tuple[int, int] = (9, 0), name: str = "NVIDIA H100 80GB HBM3"
) -> Iterator[FakeCuda]:
    """A machine with fake GPUs, inside a ``with`` block.

    Args:
        devices: how many.
        capability: compute capability that they claim.
        name: of the card.

    Yields:
        The `FakeCuda` that records.
    """
    load_device_guard()
    cuda = FakeCuda()
    with ExitStack() as stack:
        for owner, attribute, value in replacements(cuda, devices, capability, name):
            stack.enter_context(patch.object(owner, attribute, value))
        before = torch._C._only_lift_cpu_tensors()
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is a copy that is seen here
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        stack.enter_context(FakeCudaFunctions(cuda))
        stack.enter_context(cuda)
        yield cuda
