import copy

import torch

from sdmodule.conditioning.inpaint import (
    convert_to_inpaint,
    inpaint_channels,
    is_inpaint_unet,
    mask_out,
    masks_to_latents,
)
from sdmodule.module import StableDiffusionModule


def test_a_converted_unet_equals_the_ordinary_one_for_any_mask(module: StableDiffusionModule) -> None:
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


def test_the_hole_is_grey_and_the_mask_stays_hard() -> None:
    images = torch.full((1, 3, 4, 4), 0.7)
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., :2] = 1
    assert torch.equal(mask_out(images, masks)[..., :2], torch.zeros(1, 3, 4, 2))
    assert torch.equal(mask_out(images, masks)[..., 2:], images[..., 2:])
    assert torch.equal(masks_to_latents(masks, (2, 2)), torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]))
