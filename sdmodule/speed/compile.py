"""Compilation of the UNet, for training and for sampling."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from typing_extensions import override

from sdmodule.io.cache_dir import cache_dir
from sdmodule.speed.batch_sizes import padding_batches

COMPILE = ("none", "blocks", "whole")
RECOMPILE_LIMIT = 64
"""Shapes of blocks that torch must be willing to compile; its own limit is 8."""

BACKEND = "inductor"
"""Compiler backend for sampling."""

AUTOTUNED = "max-autotune-no-cudagraphs"
"""Torch's mode of compilation for ``speed.compile=autotuned``; ``speed.cuda_graphs`` are recorded apart from it."""

CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable for the folder of compiled code; torch's own default is a temporary folder."""

PAYS = 10_000.0
"""Denoising steps of images of 512 pixels from which compiling saves more time than it takes.

An estimate: compiling takes a minute or two, and saves some five milliseconds of each step on a recent GPU.
"""


def compile_unet(unet: nn.Module, which: str) -> None:
    """Compile a UNet for training, for good.

    Args:
        unet: a ``UNet2DConditionModel``.
        which: ``none``; ``blocks``, one by one, where blocks of the same shape share the compiled code; or ``whole``,
            as one graph, whose steps are faster but which takes many times as long to compile.
    """
    if which == "none":
        return
    keep_compiled_code()
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    if which == "blocks":
        for block in repeated_blocks(unet):
            block.compile(dynamic=False)
    if which == "whole":
        for layer in unet.modules():
            if type(layer) is Upsample2D and layer.use_conv and layer.norm is None and layer.name == "conv":
                layer.__class__ = DoublingUpsample2D
            elif type(layer) is nn.Conv2d and layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1:
                layer.__class__ = PixelwiseConv2d
        # size checks take 3% of a step of small layers
        unet.compile(dynamic=False, options={"size_asserts": False})


@contextmanager
def compiled(unet: Any, which: str) -> Iterator[None]:
    """Compile a UNet for sampling inside a ``with`` block.

    The first batch compiles or reads what an earlier process has compiled; ``timings.json`` reports it separately as
    the warm-up. Batches are padded to the sizes of earlier ones (see `batch_sizes`), and the length of the text is
    dynamic (see `any_length`), since each shape compiles anew.

    Args:
        unet: a ``UNet2DConditionModel``; what a training has compiled stays as it is.
        which: ``blocks``, one by one; ``autotuned``, these in torch's mode ``max-autotune-no-cudagraphs``, which takes
            minutes more; or ``whole``, as one graph.
    """
    keep_compiled_code()
    modules: list[nn.Module] = [unet] if which == "whole" else repeated_blocks(unet)
    modules = [module for module in modules if module._compiled_call_impl is None]
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, RECOMPILE_LIMIT)
    try:
        for module in modules:
            module.compile(dynamic=False, backend=BACKEND, mode=AUTOTUNED if which == "autotuned" else None)
        with padding_batches(unet), limit_reported():
            yield
    finally:
        torch._dynamo.config.recompile_limit = limit
        for module in modules:
            module._compiled_call_impl = None


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled for sampling."""
    return torch.compile(function, dynamic=False, backend=BACKEND)


def keep_compiled_code() -> None:
    """Keep compiled code in ``~/.cache/sdmodule/compiled`` for later runs, unless ``TORCHINDUCTOR_CACHE_DIR`` is set.

    Torch sets it to a temporary folder once anything has been compiled; that does not count.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # takes a while to import

    if os.environ.get(CACHE, default_cache_dir()) == default_cache_dir():
        os.environ[CACHE] = str(cache_dir() / "compiled")


@contextmanager
def limit_reported() -> Iterator[None]:
    """Say in one line if torch stops to compile inside a ``with`` block, because there are too many shapes."""
    said = False

    def replaced(record: logging.LogRecord) -> bool:
        nonlocal said
        if "hit config." not in record.getMessage():
            return True
        if not said:
            rank_zero_warn(
                f"speed.compile: torch has compiled one block in {torch._dynamo.config.recompile_limit} variants, its "
                "limit, and runs others uncompiled; sample fewer sizes and batch sizes in one process."
            )
        said = True
        return False

    logger = logging.getLogger("torch._dynamo.convert_frame")
    logger.addFilter(replaced)
    try:
        yield
    finally:
        logger.removeFilter(replaced)


def any_length(text: Tensor) -> Tensor:
    """Hidden states of text ``[B, L, D]`` for which compiled code may serve other lengths L too."""
    torch._dynamo.maybe_mark_dynamic(text, 1)
    return text


def repeated_blocks(unet: nn.Module) -> list[nn.Module]:
    """The residual and transformer blocks that a UNet repeats."""
    return [block for block in unet.modules() if isinstance(block, (ResnetBlock2D, Transformer2DModel))]


class PixelwiseConv2d(nn.Conv2d):
    """A 1x1 ``Conv2d`` that compiles to a linear layer, whose gradients take oneDNN half the time on CPU."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Convolve an image ``[B, C, h, w]``."""
        if not torch.compiler.is_compiling() or input.device.type != "cpu" or self.padding != (0, 0):
            return super().forward(input)
        return F.linear(input.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class DoublingUpsample2D(Upsample2D):
    """An ``Upsample2D`` that repeats pixels instead of interpolating; assigned through ``__class__``.

    On CPU in bfloat16, torch 2.13 computes gradients of 0 for a compiled nearest-neighbor interpolation, so that
    nothing below it learns.
    """

    @override
    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Double the size, ``[B, C, h, w]`` to ``[B, C, 2h, 2w]``, and convolve; equal to the bit."""
        height, width = hidden_states.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return _interpolate(self, hidden_states, output_size)
        repeated = hidden_states[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        return self.conv(repeated.reshape(*hidden_states.shape[:2], 2 * height, 2 * width))


@torch.compiler.disable
def _interpolate(layer: Upsample2D, hidden_states: Tensor, output_size: Any) -> Tensor:
    return Upsample2D.forward(layer, hidden_states, output_size)
