"""DeepCache: a whole run equals the plain UNet to the bit, and a cached one skips the deep layers."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sdmodule.errors import SettingsError
from sdmodule.speed.deep_cache import deep_cache
from sdmodule.tome.apply import apply_merging
from sdmodule.tome.token_merging import TokenMerging
from tests.tome.conftest import small_unet

UNETS = {
    "two levels": {},
    "three levels, one without attention": {
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
def test_a_whole_run_equals_the_plain_unet_to_the_bit(settings, side):
    unet, given = small_unet(**settings), inputs(side=side)
    with torch.no_grad():
        plain = unet(*given).sample
        with deep_cache(unet, 1):
            assert torch.equal(unet(*given).sample, plain)
        assert type(unet) is UNet2DConditionModel and not hasattr(unet, "deep")
        assert torch.equal(unet(*given).sample, plain)


def test_it_takes_controlnet_residuals():
    unet, given = small_unet(), inputs()
    generator = torch.Generator().manual_seed(3)
    shapes = [(32, 16), (32, 16), (32, 8), (64, 8)]
    residuals = [torch.randn(2, width, side, side, generator=generator) for width, side in shapes]
    middle = torch.randn(2, 64, 8, 8, generator=generator)
    more = {"down_block_additional_residuals": residuals, "mid_block_additional_residual": middle}
    with torch.no_grad():
        wanted = unet(*given, **more).sample
        with deep_cache(unet, 1) as start_step:
            assert torch.equal(unet(*given, **more).sample, wanted)
            start_step(False)
            assert torch.equal(unet(*given, **more).sample, wanted)


@pytest.mark.parametrize("layers", [1, 2])
def test_deep_features_of_the_last_whole_run_are_used(layers):
    """The same latents give the same result; for others the outer layers do most of the work."""
    unet, (latents, timestep, text) = small_unet(), inputs()
    other = latents + 0.05 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), deep_cache(unet, layers) as start_step:
        whole = unet(latents, timestep, text).sample
        wanted = unet(other, timestep, text).sample
        start_step(True)
        unet(latents, timestep, text)
        start_step(False)
        assert torch.equal(unet(latents, timestep, text).sample, whole)
        found = unet(other, timestep, text).sample
    assert not torch.equal(found, wanted)
    assert (found - wanted).norm() < 0.5 * (whole - wanted).norm() + 0.5 * wanted.norm()


def test_a_cached_step_takes_less_than_a_third_of_the_operations():
    unet, given = small_unet(), inputs()

    def operations(fresh):
        start_step(fresh)
        with FlopCounterMode(display=False) as counter:
            unet(*given)
        return counter.get_total_flops()

    with torch.no_grad(), deep_cache(unet, 1) as start_step:
        whole, outer = operations(True), operations(False)
    assert outer < whole / 3


def test_after_guidance_ends_the_prompts_half_is_used():
    unet, (latents, timestep, text) = small_unet(), inputs(rows=4)
    with torch.no_grad(), deep_cache(unet, 1) as start_step:
        whole = unet(latents, timestep, text).sample
        start_step(False)
        half = unet(latents[2:], timestep, text[2:]).sample
    assert torch.allclose(half, whole[2:], atol=1e-5)


def test_the_unet_is_restored_after_an_error():
    unet = small_unet()
    with pytest.raises(RuntimeError), torch.no_grad(), deep_cache(unet, 1):
        unet(torch.zeros(1, 3, 16, 16), torch.tensor(1), torch.zeros(1, 77, 32))
    assert type(unet) is UNet2DConditionModel and not hasattr(unet, "deep")


def test_it_works_with_token_merging():
    unet, (latents, timestep, text) = small_unet(), inputs()
    with torch.no_grad():
        with apply_merging(unet, TokenMerging(), steps=2):
            merged = unet(latents, timestep, text).sample
        with apply_merging(unet, TokenMerging(), steps=2), deep_cache(unet, 1) as start_step:
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
def test_an_error_names_the_layers_that_cannot_be_skipped(changes, layers, words):
    with pytest.raises(SettingsError) as error, deep_cache(small_unet(**changes), layers):
        pass
    assert all(word in str(error.value) for word in words), error.value
