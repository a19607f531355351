"""Numbers of a GPU that the host reads later, and sums over devices, all without a wait."""

from __future__ import annotations

import torch
from lightning import Trainer
from torch import Tensor


class HostCopy:
    """A number on its way to the host: it is copied when the GPU has computed it, and nobody waits until it is read.

    Args:
        number: a tensor of one element, on any device.
    """

    def __init__(self, number: Tensor) -> None:
        on_gpu = number.device.type == "cuda"
        self._copy = number.detach().to("cpu", non_blocking=on_gpu)
        self._copied: torch.cuda.Event | None = None
        if on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(number.device))

    def read(self) -> float:
        """The number; waits for it if it is not there yet."""
        if self._copied is not None and not self._copied.query():
            self._copied.synchronize()
        return float(self._copy)


def mean_over_devices(number: Tensor, trainer: Trainer) -> Tensor:
    """The mean of a number over the devices of a training; Lightning's own makes the host wait for a barrier."""
    if trainer.world_size == 1:
        return number
    total = number.detach().float().clone()
    torch.distributed.all_reduce(total)
    return total / trainer.world_size


def any_device(flag: Tensor, trainer: Trainer) -> Tensor:
    """1.0 where a flag is true on any device of a training, else 0.0, on all of them."""
    found = flag.float()
    if trainer.world_size > 1:
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return found
