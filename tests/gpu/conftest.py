"""Tests of this folder need an NVIDIA GPU: ``pytest -m gpu tests/gpu``, which ``make gpu`` runs too."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def card() -> None:
    """Skip where there is none."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")


@pytest.fixture(scope="session")
def tiny():
    """The embedded model on the GPU."""
    from sdmodule.module import StableDiffusionModule

    return StableDiffusionModule.from_pretrained("tiny").to("cuda")
