"""What half precision cannot decode is decoded in float32."""

import warnings

import pytest
import torch

from sdmodule.errors import SettingsError
from sdmodule.sampling.decode import decode


@pytest.fixture
def overflowing(module):
    """The module, its autoencoder with activations that float16 does not hold."""
    with torch.no_grad():
        module.vae.post_quant_conv.weight *= 2.0**6
        module.vae.decoder.conv_in.weight *= 2.0**4
    return module


def test_an_overflow_is_decoded_again_and_told_of_once(overflowing):
    latents = 1000 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = decode(overflowing.parts, latents)
        overflowing.vae.half()
        assert not torch.isfinite(overflowing.vae.decode(latents.half()).sample).all()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("default")
            for _ in range(3):
                images = decode(overflowing.parts, latents)
    assert [str(one.message).count("again in float32") for one in told] == [1]
    assert (images - wanted).abs().max() < 2e-2 and overflowing.vae.dtype == torch.float16


def test_latents_of_no_numbers_are_no_black_images(module):
    with pytest.raises(SettingsError, match="the VAE produced NaNs or infs"):
        decode(module.parts, torch.full((1, 4, 8, 8), torch.nan))
