"""A model with few blocks, for tests that trace each of them."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel

from sdmodule.module import StableDiffusionModule


@pytest.fixture(scope="module")
def few_blocks(checkpoint) -> StableDiffusionModule:
    sd = StableDiffusionModule.from_pretrained(str(checkpoint), sampling={"steps": 3, "guidance_scale": 5.0})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sd.parts.unet = sd.unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16,),
            down_block_types=("CrossAttnDownBlock2D",),
            mid_block_type=None,
            up_block_types=("CrossAttnUpBlock2D",),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=32,
            norm_num_groups=8,
        )
    return sd
