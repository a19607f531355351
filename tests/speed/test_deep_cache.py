"""The UNet that can leave out its deep layers: whole, it is the plain one to the bit; left out, they cost nothing."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sdmodule.errors import SettingsError
from sdmodule.speed.deep_cache import caching
from sdmodule.tome.settings import TokenMerging
from tests.tome.conftest import small_unet

UNETS = {
    "two levels": {},
    "three levels, of which one has no attention": {
        "channels": (16, 32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 2,
    },
}


def inputs(rows=2, side=16):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(rows, 4, side, side, generator=generator)
    return latents, torch.tensor(500), torch.randn(rows, 77, 32, generator=generator)


@pytest.mark.parametrize("settings", UNETS.values(), ids=list(UNETS))
@pytest.mark.parametrize("side", [16, 13], ids=["even", "odd"])
def test_run_whole_it_is_the_plain_one_to_the_bit(settings, side):
    unet, given = small_unet(**settings), inputs(side=side)
    with torch.no_grad():
        plain = unet(*given).sample
        with caching(unet, 1):
            assert torch.equal(unet(*given).sample, plain)
        assert type(unet) is UNet2DConditionModel and not hasattr(unet, "deep")
        assert torch.equal(unet(*given).sample, plain)


def test_it_takes_the_residuals_of_a_controlnet():
    unet, given = small_unet(), inputs()
    generator = torch.Generator().manual_seed(3)
    shapes = [(32, 16), (32, 16), (32, 8), (64, 8)]
    residuals = [torch.randn(2, width, side, side, generator=generator) for width, side in shapes]
    middle = torch.randn(2, 64, 8, 8, generator=generator)
    more = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
    with torch.no_grad():
        wanted = unet(*given, **more).sample
        with caching(unet, 1) as start_step:
            assert torch.equal(unet(*given, **more).sample, wanted)
            start_step(False)
            assert torch.equal(unet(*given, **more).sample, wanted)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_deep_layers_of_the_last_run_serve_the_next(layers):
    """For the same latents the outer layers make the same of them; for others they do most of it."""
    unet, (latents, timestep, text) = small_unet(), inputs()
    other = latents + 0.05 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), caching(unet, layers) as start_step:
        whole = unet(latents, timestep, text).sample
        wanted = unet(other, timestep, text).sample
        start_step(True)
        unet(latents, timestep, text)
        start_step(False)
        assert torch.equal(unet(latents, timestep, text).sample, whole)
        found = unet(other, timestep, text).sample
    assert not torch.equal(found, wanted)
    assert (found - wanted).norm() < 0.5 * (whole - wanted).norm() + 0.5 * wanted.norm()


def test_a_step_without_the_deep_layers_is_less_work():
    unet, given = small_unet(), inputs()

    def operations(fresh):
        start_step(fresh)
        with FlopCounterMode(display=False) as counter:
            unet(*given)
        return counter.get_total_flops()

    with torch.no_grad(), caching(unet, 1) as start_step:
        whole, outer = operations(True), operations(False)
    assert outer < whole / 3


def test_where_guidance_ends_the_prompts_half_serves():
    unet, (latents, timestep, text) = small_unet(), inputs(rows=4)
    with torch.no_grad(), caching(unet, 1) as start_step:
        whole = unet(latents, timestep, text).sample
        start_step(False)
        half = unet(latents[2:], timestep, text[2:]).sample
    assert torch.allclose(half, whole[2:], atol=1e-5)


def test_it_is_put_back_after_an_error():
    unet = small_unet()
    with pytest.raises(RuntimeError), torch.no_grad(), caching(unet, 1):
        unet(torch.zeros(1, 3, 16, 16), torch.tensor(1), torch.zeros(1, 77, 32))
    assert type(unet) is UNet2DConditionModel and not hasattr(unet, "deep")


def test_with_tokens_merged():
    unet, (latents, timestep, text) = small_unet(), inputs()
    with torch.no_grad():
        with TokenMerging().applied(unet, steps=2):
            merged = unet(latents, timestep, text).sample
        with TokenMerging().applied(unet, steps=2), caching(unet, 1) as start_step:
            assert torch.equal(unet(latents, timestep, text).sample, merged)
            start_step(False)
            assert torch.equal(unet(latents, timestep, text).sample, merged)


@pytest.mark.parametrize(
    ("changes", "layers", "words"),
    [
        ({}, 3, ["speed.cache_layers=3", "1 to 2"]),
        (
            {"down_block_types": ("AttnDownBlock2D", "CrossAttnDownBlock2D")},
            1,
            ["AttnDownBlock2D", "speed.cache_every=1"],
        ),
    ],
)
def test_what_cannot_be_left_out_is_named(changes, layers, words):
    with pytest.raises(SettingsError) as error, caching(small_unet(**changes), layers):
        pass
    assert all(word in str(error.value) for word in words), error.value
