"""What an inpainting UNet sees beside the noisy latents."""

import torch

from sdmodule.conditioning.inpaint import mask_out, masks_to_latents


def test_the_masked_area_is_grey_and_the_mask_stays_binary() -> None:
    images = torch.full((1, 3, 4, 4), 0.7)
    masks = torch.zeros(1, 1, 4, 4)
    masks[..., :2] = 1
    assert torch.equal(mask_out(images, masks)[..., :2], torch.zeros(1, 3, 4, 2))
    assert torch.equal(mask_out(images, masks)[..., 2:], images[..., 2:])
    assert torch.equal(masks_to_latents(masks, (2, 2)), torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]]))
