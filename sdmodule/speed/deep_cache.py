"""Deep features used again over several steps (Ma et al. 2024, "DeepCache: Accelerating Diffusion Models for Free").

A UNet is a row of layers down, a middle, and a row of layers up, each of which also takes what the layer down at its
own depth gave. What comes up from the depth changes little from one step to the next. So at most steps only the outer
layers are run, on the last result from inside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_blocks import (
    CrossAttnDownBlock2D,
    CrossAttnUpBlock2D,
    DownBlock2D,
    UpBlock2D,
)
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from sdmodule.errors import SettingsError

DOWN, UP = (CrossAttnDownBlock2D, DownBlock2D), (CrossAttnUpBlock2D, UpBlock2D)
Context = tuple[Tensor, Tensor]
"""Embedding of the timestep ``[B, E]``, and of the text ``[B, L, D]``."""


class Layer(NamedTuple):
    """A layer down, whose result a layer up takes too, or a layer up."""

    resnet: nn.Module | None
    attention: nn.Module | None = None
    resize: nn.Module | None = None

    def __call__(self, hidden: Tensor, context: Context) -> Tensor:
        """Run resnet and attention; the change of size is the caller's, who knows the size."""
        embedding, text = context
        if self.resnet is not None:
            hidden = self.resnet(hidden, embedding)
        if self.attention is not None:
            hidden = self.attention(hidden, encoder_hidden_states=text, return_dict=False)[0]
        return hidden


def layers_down(unet: Any) -> list[Layer]:
    """Every layer down whose result is taken again on the way up, but the first convolution."""
    layers = []
    for block in unet.down_blocks:
        layers += [Layer(*pair) for pair in _pairs(block)]
        layers += [Layer(None, None, resize) for resize in block.downsamplers or ()]
    return layers


def layers_up(unet: Any) -> list[Layer]:
    """Every layer up; the last of a block enlarges its result."""
    layers = []
    for block in unet.up_blocks:
        pairs = _pairs(block)
        resize = block.upsamplers[0] if block.upsamplers else None
        layers += [Layer(*pair) for pair in pairs[:-1]] + [Layer(*pairs[-1], resize)]
    return layers


def _pairs(block: Any) -> list[tuple[nn.Module, nn.Module | None]]:
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return list(zip(block.resnets, attentions, strict=True))


def check_cache(unet: Any, layers: int) -> None:
    """Check that the deep layers of a UNet can be left out.

    Raises:
        SettingsError: for a UNet of other blocks than Stable Diffusion's, or more layers than it has outside of its
            first change of size.
    """
    for blocks, known in ((unet.down_blocks, DOWN), (unet.up_blocks, UP)):
        for block in blocks:
            if type(block) not in known:
                raise SettingsError(
                    f"speed.cache_every leaves out deep layers of Stable Diffusion's UNet, and this one has a "
                    f"{type(block).__name__}; set speed.cache_every=1."
                )
    most = len(unet.down_blocks[0].resnets) + 1
    if layers > most:
        raise SettingsError(
            f"speed.cache_layers={layers} is more than the {most} layers of full resolution of this UNet; "
            f"give 1 to {most}."
        )


@dataclass
class DeepFeatures:
    """What a UNet keeps between steps.

    Attributes:
        layers: outer layers that run at every step.
        fresh: run all of them at the next call.
        features: what came up from inside at the last whole run, ``[B, C, h, w]``.
    """

    layers: int
    fresh: bool = True
    features: Tensor | None = field(default=None, repr=False)


class CachingUNet(UNet2DConditionModel):
    """A ``UNet2DConditionModel`` that can leave out its deep layers; one becomes it, and ceases, by its ``__class__``.

    Run whole, it gives the same to the bit as the class that it is made of.
    """

    deep: DeepFeatures

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        down_block_additional_residuals: Sequence[Tensor] = (),
        mid_block_additional_residual: Tensor | None = None,
    ) -> UNet2DConditionOutput:
        """Predict for noisy latents ``[B, C, h, w]``; of B fewer than at the last whole run, they are the last rows.

        The residuals are those of a ControlNet, as ``UNet2DConditionModel`` takes them.
        """
        deep = self.deep
        time = self.get_time_embed(sample=sample, timestep=timestep)
        context = self.time_embedding(time, None), encoder_hidden_states
        down, up = layers_down(self), layers_up(self)

        hidden = self.conv_in(sample)
        skips = [hidden]
        for layer in down if deep.fresh else down[: deep.layers - 1]:
            hidden = layer(hidden, context) if layer.resize is None else layer.resize(hidden)
            skips.append(hidden)
        if down_block_additional_residuals:
            skips = [skip + more for skip, more in zip(skips, down_block_additional_residuals, strict=False)]
        if deep.fresh:
            if self.mid_block is not None:
                hidden = self.mid_block(hidden, context[0], encoder_hidden_states=encoder_hidden_states)
            if mid_block_additional_residual is not None:
                hidden = hidden + mid_block_additional_residual
            hidden = _ascend(up[: -deep.layers], hidden, skips, context)
            deep.features = hidden
        else:
            assert deep.features is not None
            hidden = deep.features[-len(sample) :]
        hidden = _ascend(up[-deep.layers :], hidden, skips, context)
        if self.conv_norm_out is not None:
            hidden = self.conv_act(self.conv_norm_out(hidden))
        return UNet2DConditionOutput(sample=self.conv_out(hidden))


def _ascend(layers: list[Layer], hidden: Tensor, skips: list[Tensor], context: Context) -> Tensor:
    """Run layers up, each on the last of the ``skips`` too, which it takes from their end."""
    for layer in layers:
        hidden = layer(torch.cat([hidden, skips.pop()], dim=1), context)
        if layer.resize is not None:
            hidden = layer.resize(hidden, skips[-1].shape[-2:])
    return hidden


def always_whole(fresh: bool) -> None:
    """What is told before a step where all of the UNet runs at every one."""


@contextmanager
def caching(unet: Any, layers: int) -> Iterator[Callable[[bool], None]]:
    """Let a UNet leave out its deep layers inside a ``with`` block.

    Args:
        unet: a ``UNet2DConditionModel``.
        layers: outer layers that run at every step.

    Yields:
        What to call before each step, with whether it is to run all of the UNet.

    Raises:
        SettingsError: as ``check_cache`` does.
    """
    check_cache(unet, layers)
    before = unet.__class__
    deep = unet.deep = DeepFeatures(layers)
    unet.__class__ = CachingUNet

    def start_step(fresh: bool) -> None:
        deep.fresh = fresh or deep.features is None

    try:
        yield start_step
    finally:
        unet.__class__ = before
        del unet.deep
