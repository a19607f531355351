"""On a GPU nothing waits in the denoising loop after its first step, and latents are the CPU's (fake CUDA tensors)."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from sdmodule.components.checkpoint import Components, load_components
from sdmodule.components.controlnet import controlnet_from_unet
from sdmodule.components.inpaint_unet import convert_to_inpaint
from sdmodule.components.schedulers import SHORT_NAMES
from sdmodule.sampling.infer import infer
from sdmodule.sampling.settings import SamplingSettings
from tests.fake_cuda import Crossing, fake_cuda, values_of

PROMPT = "a red circle on a blue background"
PHOTO = Image.linear_gradient("L").resize((32, 32)).convert("RGB")
MASK = [4, 4, 20, 28]
MERGED = {"ratio": 0.5, "max_downsample": 2}
CACHED = {"cache_every": 2, "guidance_interval": [0.3, 0.8]}

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{name: ("usual", "text2image", {"scheduler": name}) for name in SHORT_NAMES},
    "ddim with noise, rescaled": ("usual", "text2image", {"eta": 0.8, "guidance_rescale": 0.7}),
    "inpaint by 9 channels": ("inpaint", "inpaint", {"image": PHOTO, "mask": MASK}),
    **{
        f"inpaint by 4 channels, {name}": (
            "usual",
            "inpaint",
            {"image": PHOTO, "mask": MASK, "strength": 1.0, "scheduler": name},
        )
        for name in ("ddim", "euler_a")
    },
    "image2image": ("usual", "image2image", {"image": PHOTO, "strength": 1.0}),
    "ControlNet": ("control", "text2image", {"control": PHOTO}),
    "ControlNet on the prompts alone": (
        "control",
        "text2image",
        {"control": PHOTO, "guess_mode": True, "speed": CACHED},
    ),
    "merging, exact": ("usual", "text2image", {"tome": MERGED}),
    "merging, window": ("usual", "text2image", {"tome": {**MERGED, "engine": "window", "merge_mlp": True}}),
    "merging, reused": ("usual", "text2image", {"tome": {**MERGED, "reuse_steps": 2}, "speed": CACHED}),
    "DeepCache with an interval": ("usual", "text2image", {"speed": CACHED}),
}
"""Each kind of sampling: the model and the task that do it, and the settings."""


@pytest.fixture(scope="module")
def models(checkpoint) -> list[dict[str, Components]]:
    """The models that do it, on the CPU and with the same weights on a fake GPU: one with few layers, for speed."""
    parts = load_components(str(checkpoint))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        levels = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
        levels["up_block_types"] = ["UpBlock2D", "CrossAttnUpBlock2D"]
        parts = replace(parts, unet=UNet2DConditionModel.from_config({**parts.unet.config, **levels}))
        inpaint = replace(parts, unet=copy.deepcopy(parts.unet))
        convert_to_inpaint(inpaint.unet)
        control = replace(parts, controlnet=controlnet_from_unet(parts))
        for weight in control.controlnet.parameters():
            torch.nn.init.normal_(weight, std=0.05)
    on_cpu = {"usual": parts, "inpaint": inpaint, "control": control}
    on_gpu = copy.deepcopy(on_cpu)
    networks = [*on_gpu["usual"].networks.values(), on_gpu["inpaint"].unet, on_gpu["control"].controlnet]
    with fake_cuda():
        for network in networks:
            network.to("cuda")
    return [on_cpu, on_gpu]


def sample(parts: Components, task: str, settings: dict[str, Any], cuda: Any = None) -> tuple[Any, list[Crossing]]:
    """Latents of two images, and what crossed between host and device from the end of the first step to the last's."""
    marks = []

    def mark(step: int, latents: torch.Tensor) -> None:
        marks.append(len(cuda.crossings) if cuda else 0)

    common = {"num_inference_steps": 3, "seed": 3, "return_type": "latent", "show_progress": False}
    common |= {"guidance_scale": 5.0, "num_images_per_prompt": 2, "callback_on_step_end": mark}
    sampled = infer(parts, SamplingSettings(), task, PROMPT, **{**common, **settings})["samples"]
    assert len(marks) >= 3
    return sampled, cuda.crossings[marks[0] : marks[-1]] if cuda else []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_after_the_first_step_and_latents_are_those_of_the_cpu(models, kind):
    model, task, settings = KINDS[kind]
    expected, _ = sample(models[0][model], task, settings)
    with fake_cuda() as cuda:
        sampled, inside = sample(models[1][model], task, settings, cuda)
    assert [str(one) for one in inside] == []
    assert torch.allclose(values_of(sampled), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["ddim", "euler_a", "unipc", "inpaint by 9 channels", "ControlNet", "merging, exact"])
def test_in_16_bits_latents_and_scheduler_are_in_float32(models, kind):
    model, task, settings = KINDS[kind]
    expected, _ = sample(models[0][model], task, settings)
    with fake_cuda() as cuda:
        parts = copy.deepcopy(models[1][model])
        for network in (*parts.networks.values(), *parts.controlnets):
            network.half()
        sampled, inside = sample(parts, task, settings, cuda)
        images = infer(parts, SamplingSettings(), task, PROMPT, num_inference_steps=2, return_type="tensor", **settings)
    assert inside == [] and sampled.dtype == torch.float32
    assert 0 < (values_of(sampled) - expected).norm() < 0.02 * expected.norm()
    assert images["samples"].isfinite().all()
