"""Small UNets, their inputs, and tomesd applied with a seed."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import tomesd
import torch
from diffusers import UNet2DConditionModel


def small_unet(channels=(32, 64), **changes):
    """A UNet with transformer blocks at every level, random, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        settings = {
            "sample_size": 16,
            "block_out_channels": channels,
            "down_block_types": ("CrossAttnDownBlock2D",) * len(channels),
            "up_block_types": ("CrossAttnUpBlock2D",) * len(channels),
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 32,
            "norm_num_groups": 8,
        }
        return UNet2DConditionModel(**{**settings, **changes}).eval()


@contextmanager
def tomesd_applied(unet, seed=0, **settings):
    """The package itself, with a seeded generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tomesd.apply_patch(unet, **settings)
        try:
            yield
        finally:
            tomesd.remove_patch(unet)


@pytest.fixture
def unet():
    return small_unet()


@pytest.fixture
def inputs():
    """Arguments of the UNet: a batch of two halves."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    return latents, 500, torch.randn(2, 7, 32, generator=generator)
