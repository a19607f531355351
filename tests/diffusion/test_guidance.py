"""Guidance and its rescaling, against the formulas of their papers."""

from __future__ import annotations

import pytest
import torch

from sdmodule.diffusion.guidance import classifier_free_guidance, rescale_guidance


@pytest.fixture
def predictions() -> torch.Tensor:
    return torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def test_guidance_extrapolates_from_unconditional_to_conditional(predictions):
    unconditional, conditional = predictions
    assert torch.equal(classifier_free_guidance(unconditional, conditional, 0.0), unconditional)
    torch.testing.assert_close(classifier_free_guidance(unconditional, conditional, 1.0), conditional)
    # Ho and Salimans write (1 + w) conditional - w unconditional
    torch.testing.assert_close(
        classifier_free_guidance(unconditional, conditional, 7.5), 7.5 * conditional - 6.5 * unconditional
    )


def test_rescaling_restores_the_standard_deviation_of_the_conditional_prediction(predictions):
    unconditional, conditional = predictions
    guided = classifier_free_guidance(unconditional, conditional, 7.5)
    axes = (1, 2, 3)
    torch.testing.assert_close(rescale_guidance(guided, conditional, 1.0).std(dim=axes), conditional.std(dim=axes))
    assert torch.equal(rescale_guidance(guided, conditional, 0.0), guided)
    halfway = (rescale_guidance(guided, conditional, 1.0) + guided) / 2
    torch.testing.assert_close(rescale_guidance(guided, conditional, 0.5), halfway)


def test_each_image_is_rescaled_independently(predictions):
    guided, conditional = predictions
    alone = rescale_guidance(guided[:1], conditional[:1], 0.7)
    torch.testing.assert_close(rescale_guidance(guided, conditional, 0.7)[:1], alone)
