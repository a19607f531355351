"""The gradient of an optimizer step as the mean over the images in it, however they are spread over batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DistributedSampler


class GradientMean:
    """Weights the accumulated batches of an optimizer step by their images.

    Lightning divides the loss of every batch by ``accumulate_grad_batches`` and averages over the devices. That is the
    mean over the images of the step only if all its batches are equally large and none is missing, which the last step
    of an epoch may break. Where all is regular, nothing is multiplied and gradients are Lightning's to the bit.
    """

    def __init__(self) -> None:
        self._images = 0  # of this device, in this step so far

    def weigh(self, loss: Tensor, images: int, trainer: Trainer | None) -> Tensor:
        """The loss of a batch, weighted by its images relative to a full batch.

        Args:
            loss: mean over the images of the batch.
            images: in the batch.
            trainer: gives the size of a full batch; None is a batch on its own.
        """
        if trainer is None:
            return loss
        self._images += images
        full = full_batch_size(trainer, images)
        return loss if images == full else loss * (images / full)

    @torch.no_grad()
    def rescale(self, parameters: Iterable[nn.Parameter], trainer: Trainer) -> None:
        """Make the accumulated gradients the mean over the step's images; called once, before the optimizer steps."""
        own, self._images = self._images, 0
        full = full_batch_size(trainer, own)
        wanted = trainer.accumulate_grad_batches * full * trainer.world_size
        images = self._all_images(own, trainer)
        if images in (wanted, 0):
            return
        gradients = [weight.grad for weight in parameters if weight.grad is not None]
        if gradients:
            torch._foreach_mul_(gradients, wanted / images)

    @staticmethod
    def _all_images(own: int, trainer: Trainer) -> int:
        """Images in the step, over all devices."""
        loader = trainer.train_dataloader
        equal = isinstance(getattr(loader, "sampler", None), DistributedSampler) and batch_size_of(loader) is not None
        if trainer.world_size == 1 or equal:  # to ask the others, a GPU would have to be waited for
            return own * trainer.world_size
        total = trainer.strategy.reduce(torch.tensor(float(own), device=trainer.strategy.root_device), reduce_op="sum")
        return round(float(total))


def batch_size_of(loaders: Any, index: int = 0) -> int | None:
    """Batch size of a trainer's loader, or of one of several; None if it does not say."""
    loader = loaders[index] if isinstance(loaders, (list, tuple)) else loaders
    # for prediction, Lightning gives a loader a batch sampler of its own
    sizes = (getattr(owner, "batch_size", None) for owner in (loader, getattr(loader, "batch_sampler", None)))
    return next((size for size in sizes if isinstance(size, int)), None)


def validation_loader(trainer: Trainer, index: int = 0) -> Any:
    """The loader that validation or testing runs on, or one of several."""
    loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
    return loaders[index] if isinstance(loaders, (list, tuple)) else loaders


def full_batch_size(trainer: Trainer, default: int) -> int:
    """Images in a full batch on each device, the same on all of them; ``default`` for a loader that does not say."""
    size = batch_size_of(trainer.train_dataloader)
    if size is not None:
        return size
    return default if trainer.world_size == 1 and trainer.accumulate_grad_batches == 1 else 1
