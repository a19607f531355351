"""Linear layers in 8 bits: a small error, and the model as it was afterwards."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.speed.quantize import check_quantize, layers_to_quantize
from sdmodule.speed.speed_settings import SpeedSettings
from tests.fake_cuda import fake_cuda

needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")


@pytest.fixture(scope="module")
def sd(checkpoint) -> StableDiffusionModule:
    return StableDiffusionModule.from_pretrained(str(checkpoint), sampling={"steps": 4, "guidance_scale": 3.0})


def sampled(sd, **settings):
    return sd.infer("a red circle", return_type="tensor", show_progress=False, **settings)["samples"]


@needs_torchao
def test_int8_differs_by_little_and_the_weights_come_back(sd):
    weights = dict(sd.named_parameters())
    plain = sampled(sd)
    quantized = sampled(sd, speed={"quantize": "int8"})
    error = (quantized - plain).square().mean()
    assert 0 < error and -10 * torch.log10(error) > 40  # dB
    assert all(weight is weights[name] for name, weight in sd.named_parameters())
    assert torch.equal(sampled(sd), plain)


def test_layers_of_the_text_and_narrow_ones_stay(sd):
    names = {id(layer): name for name, layer in sd.unet.named_modules()}
    chosen = [names[id(layer)] for layer in layers_to_quantize(sd.unet)]
    assert any(name.endswith("attn1.to_k") for name in chosen) and any(".ff." in name for name in chosen)
    assert not any(name.endswith(("attn2.to_k", "attn2.to_v")) or "time_emb" in name for name in chosen)


def test_what_is_missing_is_said_in_one_sentence(monkeypatch):
    with monkeypatch.context() as without:
        without.setattr("sdmodule.speed.quantize.find_spec", lambda name: None)
        with pytest.raises(SettingsError, match=r"quantize=int8: .* pip install torchao\."):
            check_quantize("int8")
    monkeypatch.setattr("sdmodule.speed.quantize.find_spec", lambda name: True)
    check_quantize("int8", "cpu")
    with pytest.raises(SettingsError, match=r"quantize=fp8: needs a CUDA GPU, and this runs on cpu"):
        check_quantize("fp8", "cpu")
    with fake_cuda(capability=(8, 6)), pytest.raises(SettingsError, match=r"capability 8\.9, and this one has 8\.6"):
        check_quantize("fp8")
    with fake_cuda(capability=(9, 0)):
        check_quantize("fp8")
    with pytest.raises(SettingsError, match=r"quantize=int8, speed\.offload=model: exclude each other"):
        SpeedSettings(quantize="int8", offload="model")
