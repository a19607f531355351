"""Decoding falls back to float32 where half precision overflows."""

import warnings

import pytest
import torch

from sdmodule.errors import SettingsError
from sdmodule.sampling.decode import decode


@pytest.fixture
def overflowing(module):
    """A module whose VAE has activations that overflow float16."""
    with torch.no_grad():
        module.vae.post_quant_conv.weight *= 2.0**6
        module.vae.decoder.conv_in.weight *= 2.0**4
    return module


def test_an_overflow_is_decoded_in_float32_with_a_single_warning(overflowing):
    latents = 1000 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = decode(overflowing.parts, latents)
        overflowing.vae.half()
        assert not torch.isfinite(overflowing.vae.decode(latents.half()).sample).all()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            for _ in range(3):
                images = decode(overflowing.parts, latents)
    assert [str(one.message).count("again in float32") for one in caught] == [1]
    assert (images - expected).abs().max() < 2e-2 and overflowing.vae.dtype == torch.float16


def test_nan_latents_are_an_error_and_not_black_images(module):
    with pytest.raises(SettingsError, match="the UNet produced NaNs or infs"):
        decode(module.parts, torch.full((1, 4, 8, 8), torch.nan))
