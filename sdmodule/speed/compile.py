"""Compilation of the UNet for training."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from typing_extensions import override

from sdmodule.errors import SettingsError, choices

COMPILE = ("none", "blocks", "whole")


def check_compile(which: str) -> None:
    """Check what is to be compiled.

    Raises:
        SettingsError: if it is not known.
    """
    if which not in COMPILE:
        raise SettingsError(f"model.compile={which} is not known; give one of {choices(COMPILE)}.")


def compile_unet(unet: nn.Module, which: str) -> None:
    """Compile a UNet.

    Args:
        unet: a ``UNet2DConditionModel``.
        which: ``none``; ``blocks``, each by itself, of which those that are alike share what was compiled; or
            ``whole``, as one graph, whose steps are faster and which takes many times as long to compile.
    """
    if which == "none":
        return
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    if which == "blocks":
        for block in blocks_to_compile(unet):
            block.compile(dynamic=False)
    if which == "whole":
        for layer in unet.modules():
            if type(layer) is Upsample2D and layer.use_conv and layer.norm is None and layer.name == "conv":
                layer.__class__ = DoublingUpsample2D
            elif type(layer) is nn.Conv2d and layer.kernel_size == layer.stride == (1, 1) and layer.groups == 1:
                layer.__class__ = PixelwiseConv2d
        unet.compile(dynamic=False, options={"size_asserts": False})  # which take 3% of a step of small layers


def blocks_to_compile(unet: nn.Module) -> list[nn.Module]:
    """The blocks of which a UNet is made many times over."""
    return [block for block in unet.modules() if isinstance(block, (ResnetBlock2D, Transformer2DModel))]


class PixelwiseConv2d(nn.Conv2d):
    """A ``Conv2d`` of 1x1 that is compiled as a linear layer, whose gradients take oneDNN half of the time on CPU."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Convolve an image ``[B, C, h, w]``."""
        if not torch.compiler.is_compiling() or input.device.type != "cpu" or self.padding != (0, 0):
            return super().forward(input)
        return F.linear(input.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class DoublingUpsample2D(Upsample2D):
    """An ``Upsample2D`` that repeats pixels without interpolation; one becomes it by its ``__class__``.

    On CPU in bfloat16, torch 2.13 computes gradients of 0 for a compiled interpolation to the nearest neighbour, and
    everything below it then learns nothing.
    """

    @override
    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Twice as high and wide, ``[B, C, h, w]`` to ``[B, C, 2h, 2w]``, and convolved, equal to the bit."""
        height, width = hidden_states.shape[2:]
        if output_size is not None and tuple(output_size) != (2 * height, 2 * width):
            return _interpolated(self, hidden_states, output_size)
        repeated = hidden_states[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)
        return self.conv(repeated.reshape(*hidden_states.shape[:2], 2 * height, 2 * width))


@torch.compiler.disable
def _interpolated(layer: Upsample2D, hidden_states: Tensor, output_size: Any) -> Tensor:
    return Upsample2D.forward(layer, hidden_states, output_size)
