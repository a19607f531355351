"""Deep features cached over several steps (Ma et al. 2024, "DeepCache: Accelerating Diffusion Models for Free").

The features that reach the outer layers of a UNet from its deep ones change little from step to step. So most steps
run the outer layers only, on the deep features of an earlier step.
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
"""Embeddings of the timestep ``[B, E]`` and of the text ``[B, L, D]``."""


class Layer(NamedTuple):
    """One layer of the UNet's path down, which feeds a skip connection, or of its path up, which takes one."""

    resnet: nn.Module | None
    attention: nn.Module | None = None
    resize: nn.Module | None = None

    def __call__(self, hidden: Tensor, context: Context) -> Tensor:
        """Run resnet and attention; the caller, who knows the size, runs ``resize``."""
        embedding, text = context
        if self.resnet is not None:
            hidden = self.resnet(hidden, embedding)
        if self.attention is not None:
            hidden = self.attention(hidden, encoder_hidden_states=text, return_dict=False)[0]
        return hidden


def layers_down(unet: Any) -> list[Layer]:
    """The layers of the path down that feed a skip connection, without the first convolution."""
    layers = []
    for block in unet.down_blocks:
        layers += [Layer(*pair) for pair in _pairs(block)]
        layers += [Layer(None, None, resize) for resize in block.downsamplers or ()]
    return layers


def layers_up(unet: Any) -> list[Layer]:
    """The layers of the path up; the last one of a block upsamples its result."""
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
    """Check that a UNet's deep features can be cached.

    Args:
        unet: a ``UNet2DConditionModel``.
        layers: outer layers that run at every step.

    Raises:
        SettingsError: for blocks that Stable Diffusion does not have, or more layers than the UNet has before its first
            downsampling.
    """
    for blocks, known in ((unet.down_blocks, DOWN), (unet.up_blocks, UP)):
        for block in blocks:
            if type(block) not in known:
                raise SettingsError(
                    f"speed.cache_every: works with the blocks of Stable Diffusion's UNet, and this one has a "
                    f"{type(block).__name__}; set speed.cache_every=1."
                )
    limit = len(unet.down_blocks[0].resnets) + 1
    if layers > limit:
        raise SettingsError(
            f"speed.cache_layers={layers}: must be from 1 to {limit}, the layers of this UNet at full resolution."
        )


@dataclass
class DeepFeatures:
    """What a UNet caches between steps.

    Attributes:
        layers: outer layers that run at every step.
        fresh: run the whole UNet at the next call.
        features: input of the outer layers on the path up, from the last whole run, ``[B, C, h, w]``.
    """

    layers: int
    fresh: bool = True
    features: Tensor | None = field(default=None, repr=False)


class CachingUNet(UNet2DConditionModel):
    """A ``UNet2DConditionModel`` that can skip its deep layers; assigned through ``__class__``.

    Run whole, it returns what diffusers' class returns, to the bit.
    """

    deep: DeepFeatures

    def forward(  # type: ignore[override]
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        down_block_additional_residuals: Sequence[Tensor] = (),
        mid_block_additional_residual: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> UNet2DConditionOutput:
        """Prediction for noisy latents ``[B, C, h, w]``.

        Fewer rows than in the last whole run are its last ones: the prompts' half, once guidance has ended. The
        residuals are those of a ControlNet, and ``added_cond_kwargs`` what else the UNet takes beside text.
        """
        deep = self.deep
        time = self.get_time_embed(sample=sample, timestep=timestep)
        embedding = self.time_embedding(time, None)
        more = self.get_aug_embed(embedding, encoder_hidden_states, added_cond_kwargs or {})
        embedding = embedding if more is None else embedding + more
        context = embedding, encoder_hidden_states
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
    """Run layers of the path up; each takes the last of the ``skips`` off the list."""
    for layer in layers:
        hidden = layer(torch.cat([hidden, skips.pop()], dim=1), context)
        if layer.resize is not None:
            hidden = layer.resize(hidden, skips[-1].shape[-2:])
    return hidden


def run_all_layers(fresh: bool) -> None:
    """The start-step function without DeepCache: the whole UNet runs at every step."""


@contextmanager
def deep_cache(unet: Any, layers: int) -> Iterator[Callable[[bool], None]]:
    """Let a UNet skip its deep layers inside a ``with`` block.

    Args:
        unet: a ``UNet2DConditionModel``.
        layers: outer layers that run at every step.

    Yields:
        A function to call before each step, with whether the whole UNet is to run.

    Raises:
        SettingsError: as `check_cache` does.
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
