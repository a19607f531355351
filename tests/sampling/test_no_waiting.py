"""On a GPU nothing waits in the denoising loop after its first step, and latents are the CPU's (fake CUDA tensors)."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
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
from sdmodule.speed.apply import apply_speed
from sdmodule.speed.fused_step import fusing_steps
from sdmodule.speed.layout import is_channels_last
from sdmodule.speed.speed_settings import SpeedSettings
from tests.fake_cuda import Crossing, FakeCuda, fake_cuda, values_of

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


COMMON: dict[str, Any] = {
    "num_inference_steps": 3,
    "seed": 3,
    "return_type": "latent",
    "guidance_scale": 5.0,
    "num_images_per_prompt": 2,
    "show_progress": False,
}
"""Settings of all kinds."""

ALLOWED = {"sampling/stopwatch.py elapsed": "infer returns the seconds of each stage, once the last has ended"}
"""Where the host may wait in a call of ``infer`` that returns latents, and why."""


def small_models(checkpoint: Path) -> dict[str, Components]:
    """The models that do it, with few layers, for speed."""
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
    return {"usual": parts, "inpaint": inpaint, "control": control}


def moved(models: dict[str, Components], *to: Any) -> dict[str, Components]:
    """Copies of models on a device or of a dtype."""
    models = copy.deepcopy(models)
    for network in (*models["usual"].networks.values(), models["inpaint"].unet, models["control"].controlnet):
        network.to(*to)
    return models


@pytest.fixture(scope="module")
def models(checkpoint) -> list[dict[str, Components]]:
    """The models on the CPU, and with the same weights on a fake GPU."""
    on_cpu = small_models(checkpoint)
    with fake_cuda():
        return [on_cpu, moved(on_cpu, "cuda")]


def sample(
    parts: Components, task: str, settings: dict[str, Any], cuda: FakeCuda | None = None
) -> tuple[torch.Tensor, list[Crossing]]:
    """Latents of two images, and what crossed between host and device from the end of the first step to the last's."""
    marks = []

    def mark(step: int, latents: torch.Tensor) -> None:
        marks.append(len(cuda.crossings) if cuda else 0)

    settings = {**COMMON, "callback_on_step_end": mark, **settings}
    sampled = infer(parts, SamplingSettings(), task, PROMPT, **settings)["samples"]
    assert len(marks) >= 3
    return sampled, cuda.crossings[marks[0] : marks[-1]] if cuda else []


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_after_the_first_step_and_latents_are_those_of_the_cpu(models, kind):
    model, task, settings = KINDS[kind]
    expected, _ = sample(models[0][model], task, settings)
    with fake_cuda() as cuda:
        sampled, inside = sample(models[1][model], task, settings, cuda)
    assert [str(one) for one in inside] == []
    cuda.check(cuda.crossings, ALLOWED)
    assert torch.allclose(values_of(sampled), expected, atol=1e-4)


FUSED = [*SHORT_NAMES, "ddim with noise, rescaled", "inpaint by 4 channels, euler_a", "DeepCache with an interval"]


@pytest.mark.parametrize("kind", FUSED)
def test_nothing_waits_where_guidance_and_step_are_one_function(models, kind):
    model, task, settings = KINDS[kind]
    expected, _ = sample(models[0][model], task, settings)
    with fake_cuda() as cuda, fusing_steps(models[1][model].unet, lambda function: function):
        sampled, inside = sample(models[1][model], task, settings, cuda)
    assert [str(one) for one in inside] == []
    cuda.check(cuda.crossings, ALLOWED)
    assert torch.allclose(values_of(sampled), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["euler_a", "unipc", "inpaint by 9 channels", "ControlNet"])
def test_in_16_bits_latents_and_scheduler_are_in_float32(models, kind):
    model, task, settings = KINDS[kind]
    expected, _ = sample(models[0][model], task, settings)
    with fake_cuda() as cuda:
        sampled, inside = sample(moved(models[1], torch.float16)[model], task, settings, cuda)
    assert inside == [] and sampled.dtype == torch.float32
    assert 0 < (values_of(sampled) - expected).norm() < 0.02 * expected.norm()


def test_a_controlnet_has_layout_attention_and_caches_of_the_unet(models):
    """But for layout and attention on a CPU, where its images stay those of earlier releases."""
    calls = []
    for model in models:
        embedding = model["control"].controlnet.controlnet_cond_embedding
        embedding.register_forward_hook(lambda *_: calls.append("embedding"))
    settings = SpeedSettings(attention="math", channels_last=True)
    for parts, speed in zip(
        [model["control"] for model in models], ("AttnProcessor2_0", "NamedAttention"), strict=True
    ):
        net, on_gpu = parts.controlnet, speed == "NamedAttention"
        with fake_cuda() as cuda, apply_speed(parts, settings):
            assert {type(one).__name__ for one in net.attn_processors.values()} == {speed}
            assert is_channels_last(net) == on_gpu
            calls.clear()
            sample(parts, "text2image", {"control": PHOTO}, cuda)
            assert calls == ["embedding"]
        assert {type(one).__name__ for one in net.attn_processors.values()} == {"AttnProcessor2_0"}
