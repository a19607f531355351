"""channels_last: in every layer, with the same result, and restored afterwards."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from sdmodule.speed.layout import channels_last


@pytest.fixture(scope="module", params=[False, True], ids=["convolutions", "linear"])
def unet(request):
    """Stable Diffusion 1.x projects tokens by convolutions, 2.x by linear layers."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=8,
        use_linear_projection=request.param,
    ).eval()


@torch.no_grad()
def call(unet, **options):
    generator = torch.Generator().manual_seed(1)
    latents, text = torch.randn(2, 4, 8, 6, generator=generator), torch.randn(2, 7, 32, generator=generator)
    return unet(latents, 5, encoder_hidden_states=text, **options)


def test_the_result_is_the_same(unet):
    mask = torch.ones(2, 7)
    mask[:, 4:] = 0
    plain, masked = call(unet).sample, call(unet, encoder_attention_mask=mask, return_dict=False)[0]
    assert not torch.allclose(plain, masked, atol=1e-3)
    with channels_last(unet):
        torch.testing.assert_close(call(unet).sample, plain, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            call(unet, encoder_attention_mask=mask, return_dict=False)[0], masked, atol=1e-5, rtol=0
        )
    assert torch.equal(call(unet).sample, plain)
    assert {type(part) for part in unet.modules() if isinstance(part, Transformer2DModel)} == {Transformer2DModel}


def test_every_layer_after_the_first_gets_channels_last(unet):
    seen = {}

    def look(name):
        def hook(module, given, result):
            seen[name] = given[0].is_contiguous(memory_format=torch.channels_last)

        return hook

    hooks = [
        part.register_forward_hook(look(name))
        for name, part in unet.named_modules()
        if isinstance(part, (torch.nn.Conv2d, torch.nn.GroupNorm)) and name != "conv_in"
    ]
    try:
        with channels_last(unet):
            call(unet)
        assert len(seen) > 20 and all(seen.values()), [name for name, last in seen.items() if not last]
        call(unet)
        assert not any(last for name, last in seen.items() if "resnets" in name)
    finally:
        for hook in hooks:
            hook.remove()
