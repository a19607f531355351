"""An ordinary UNet becomes an inpainting UNet without changing what it predicts."""

import copy
from types import SimpleNamespace

import pytest
import torch

from sdmodule.components.inpaint_unet import convert_to_inpaint, is_inpaint_unet
from sdmodule.conditioning.inpaint import inpaint_channels
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule


def test_a_converted_unet_predicts_the_same_for_any_mask(module: StableDiffusionModule) -> None:
    ordinary, converted = module.unet, copy.deepcopy(module.unet)
    convert_to_inpaint(converted)
    assert is_inpaint_unet(converted) and not is_inpaint_unet(ordinary)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        latents, masked_latents = torch.randn(2, 2, 4, 8, 8, generator=generator)
        masks = (torch.rand(2, 1, 32, 32, generator=generator) < 0.5).float()
        text = torch.randn(2, 77, 32, generator=generator)
        seen = torch.cat([latents, inpaint_channels(masks, masked_latents)], dim=1)
        with torch.no_grad():
            wanted = ordinary(latents, 500, encoder_hidden_states=text).sample
            result = converted(seen, 500, encoder_hidden_states=text).sample
        assert torch.equal(result, wanted)


def test_a_unet_of_other_channels_is_refused() -> None:
    unet = SimpleNamespace(config=SimpleNamespace(in_channels=7, out_channels=4))
    with pytest.raises(SettingsError, match=r"unet\.in_channels=7: must be 4 \(text2image\) or 9 \(inpaint\)"):
        is_inpaint_unet(unet)
