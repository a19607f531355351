"""Weights that wait in the host's memory: the CPU stands in for the GPU, with copies of the weights in use."""

from __future__ import annotations

import pytest
import torch

from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.speed.offload import Card, groups_of, kept_on_host, offloaded, parts_of
from sdmodule.speed.speed_settings import SpeedSettings
from tests.fake_cuda import fake_cuda

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sd(checkpoint) -> StableDiffusionModule:
    return StableDiffusionModule.from_pretrained(str(checkpoint), sampling={"steps": 2, "guidance_scale": 5.0})


def sampled(sd, **settings):
    return sd.infer("a star", return_type="tensor", show_progress=False, **settings)["samples"]


@pytest.mark.parametrize("speed", [{}, {"cache_every": 2}], ids=str)
@pytest.mark.parametrize("how", ["model", "sequential"])
def test_the_images_are_those_of_a_model_that_stays(sd, how, speed, monkeypatch):
    expected = sampled(sd, speed=speed)
    weights = {name: (weight, weight.data_ptr()) for name, weight in sd.named_parameters()}
    most, bring = [], Card.bring
    monkeypatch.setattr(Card, "bring", lambda card, unit: (bring(card, unit), most.append(on_card(weights)))[0])
    with offloaded(groups_of(sd.parts), CPU, how) as card:
        assert torch.equal(sampled(sd, speed=speed), expected)
        card.clear()
        assert not on_card(weights)
    assert all(weight is weights[name][0] for name, weight in sd.named_parameters())
    assert not any(module._forward_pre_hooks or hasattr(module, "_hf_hook") for module in sd.modules())
    unet = sum(weight.numel() for weight in sd.unet.parameters())
    assert max(most) < (unet if how == "model" else unet / 4)
    assert torch.equal(sampled(sd, speed=speed), expected)


def point(weight, values):
    """As `offload.point`; the data of a parameter cannot be set to a fake CUDA tensor."""
    torch.utils.swap_tensors(
        weight, torch.nn.Parameter(values, False) if isinstance(weight, torch.nn.Parameter) else values.clone()
    )


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_a_model_in_host_memory_samples_on_the_gpu(sd, how, monkeypatch):
    monkeypatch.setattr("sdmodule.speed.offload.point", point)
    speed, devices = {"channels_last": True}, set()
    expected = sampled(sd, speed=speed)
    see = {"callback_on_step_end": lambda step, latents: devices.add(latents.device.type)}
    with fake_cuda() as cuda:
        sample = sampled(sd, speed={**speed, "offload": how}, **see)
    assert torch.allclose(sample, expected, atol=1e-4)  # strides of layers on one pixel, and so kernels, may differ
    assert sd.unet.conv_in.weight.is_contiguous() and sd.vae.decoder.conv_out.weight.is_contiguous()
    assert devices == {"cuda"} and not sd.unet.conv_in.weight.is_cuda
    weights = [one for one in cuda.crossings if one.place == "speed/offload.py Card.bring"]
    assert weights and not any(one.waits for one in weights)


def on_card(weights):
    """Number of weights that are not where they were."""
    return sum(weight.numel() for weight, address in weights.values() if weight.data_ptr() != address)


def test_text_encoder_unet_and_vae_take_turns(sd, monkeypatch):
    order, bring = [], Card.bring
    names = {id(weight): name.split(".")[0] for name, weight in sd.named_parameters()}
    monkeypatch.setattr(Card, "bring", lambda card, unit: (bring(card, unit), order.append(names[id(unit[0])]))[0])
    with offloaded(groups_of(sd.parts), CPU):
        sampled(sd)
    assert list(dict.fromkeys(order)) == ["text_encoder", "unet", "vae"]
    assert order == sorted(order, key=["text_encoder", "unet", "vae"].index)


def test_a_vae_that_is_cast_while_it_is_on_the_card_gets_its_own_weights_back(sd):
    with offloaded([[sd.vae]], CPU):
        sd.vae.decode(torch.zeros(1, 4, 4, 4))
        sd.vae.bfloat16()
        sd.vae.decode(torch.zeros(1, 4, 4, 4, dtype=torch.bfloat16))
        sd.vae.float()
    assert sd.vae.dtype == torch.float32


def test_parts_of_a_network_hold_all_of_its_weights(sd):
    parts = parts_of(sd.unet)
    held = [id(weight) for part in parts for weight in part.parameters()]
    assert sorted(held) == sorted(id(weight) for weight in sd.unet.parameters()) and len(parts) > 10


def test_a_model_that_waits_in_host_memory_is_cast_but_not_moved():
    waiting, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    with fake_cuda(), kept_on_host([waiting]):
        torch.nn.Sequential(waiting, other).to("cuda", torch.bfloat16)
        assert other.weight.is_cuda and not waiting.weight.is_cuda
        assert other.weight.dtype == waiting.weight.dtype == torch.bfloat16
    assert "_apply" not in vars(waiting)


def test_offloading_is_refused_without_a_gpu_and_where_code_is_compiled(sd, checkpoint):
    with pytest.raises(SettingsError, match=r"speed\.offload=model: saves the memory of a CUDA GPU, .* on cpu"):
        sampled(sd, speed={"offload": "model"})
    with pytest.raises(SettingsError, match=r"speed\.offload=sequential, speed\.compile=blocks: .*compile=none"):
        SpeedSettings(offload="sequential", compile="blocks")
    assert SpeedSettings(offload="sequential", compile="auto").compile_on("cuda") == "none"
