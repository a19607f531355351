"""``infer`` equals the pipelines of diffusers, pixel for pixel, over a grid of their arguments.

Every value of an argument meets every value of the next ones at least once; all combinations would take an hour.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionControlNetPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from sdmodule.components.controlnet import controlnet_from_unet
from sdmodule.components.save import save_model
from sdmodule.components.schedulers import SHORT_NAMES, make_scheduler
from sdmodule.module import StableDiffusionModule
from tests.pipelines import diffusers_pipeline
from tests.reported.drawing import ramp, strokes

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle on a blue background", "a star"]
SIZES = [(32, 32), (24, 40), (40, 24)]
STEPS = [1, 2, 5]
SPACINGS = [None, "leading", "trailing", "linspace"]
GUIDANCES = [1.0, 3.0, 7.5]
GENERATORS = ["one", "each"]
STRENGTHS = [1.0, 0.6, 0.3]


def grid(*axes: list) -> list[tuple]:
    """Combinations in which the first axis meets every value of each other axis at least once."""
    first, *others = axes
    width = max(map(len, others))
    return [
        (value, *(axis[(k + shift) % len(axis)] for shift, axis in enumerate(others)))
        for value, k in itertools.product(first, range(width))
    ]


def scheduler_of(name: str, spacing: str | None, base: Any) -> Any:
    settings = {"name": name, "timestep_spacing": spacing} if spacing else name
    accepted = make_scheduler(name, base)._get_init_keys(type(make_scheduler(name, base)))
    return settings if spacing is None or "timestep_spacing" in accepted else name


def generators(kind: str) -> Any:
    if kind == "one":
        return torch.Generator().manual_seed(5)
    return [torch.Generator().manual_seed(5 + k) for k in range(2)]


@pytest.fixture(scope="module")
def models(checkpoint, tmp_path_factory) -> dict[str, StableDiffusionModule]:
    """The checkpoint for each task, loaded once."""
    folder = tmp_path_factory.mktemp("net")
    plain = StableDiffusionModule.from_pretrained(checkpoint)
    net = controlnet_from_unet(plain.parts)
    generator = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    save_model(net, folder)
    return {
        "text": plain,
        "inpaint": StableDiffusionModule.from_pretrained(checkpoint, task="inpaint"),
        "control": StableDiffusionModule.from_pretrained(checkpoint, components={"controlnet": folder}),
    }


@pytest.mark.parametrize(
    ("scheduler", "steps", "size", "spacing", "guidance", "generator"),
    grid(list(SHORT_NAMES), STEPS, SIZES, SPACINGS, GUIDANCES, GENERATORS),
)
def test_text_to_image(models, scheduler, steps, size, spacing, guidance, generator):
    module = models["text"]
    chosen = scheduler_of(scheduler, spacing, module.parts.scheduler.config)
    common = {"height": size[0], "width": size[1], "num_inference_steps": steps, "guidance_scale": guidance}
    ours = module.infer(
        PROMPTS, generator=generators(generator), scheduler=chosen, return_type="numpy", show_progress=False, **common
    )["samples"]
    made = diffusers_pipeline(module.parts, StableDiffusionPipeline, chosen)
    theirs = made(PROMPTS, generator=generators(generator), output_type="np", **common).images
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("scheduler", "strength", "steps", "guidance"), grid(list(SHORT_NAMES), STRENGTHS, [4, 7], [1.0, 4.0])
)
def test_the_masked_area(models, scheduler, strength, steps, guidance):
    module = models["inpaint"]
    photo, mask = ramp(size=(32, 32)), strokes((0, 0, 0), (255, 255, 255)).resize((32, 32))
    common = {"num_inference_steps": steps, "guidance_scale": guidance}
    ours = module.infer(
        PROMPTS[0],
        photo,
        mask,
        generator=generators("one"),
        scheduler=scheduler,
        inpaint={"strength": strength},
        show_progress=False,
        **common,
    )["samples"][0]
    made = diffusers_pipeline(module.parts, StableDiffusionInpaintPipeline, scheduler)
    theirs = made(
        PROMPTS[0],
        image=photo,
        mask_image=mask,
        height=32,
        width=32,
        strength=strength,
        generator=generators("one"),
        **common,
    ).images[0]
    inside = np.asarray(mask.convert("L")) > 127
    assert np.array_equal(np.asarray(ours)[inside], np.asarray(theirs)[inside])


@pytest.mark.parametrize(
    ("scheduler", "scale", "size", "guidance"), grid(["ddim", "euler_a", "unipc"], [0.4, 1.0, 1.7], SIZES, [1.0, 4.0])
)
def test_a_controlnet(models, scheduler, scale, size, guidance):
    module = models["control"]
    common = {"height": size[0], "width": size[1], "num_inference_steps": 3, "guidance_scale": guidance}
    control = ramp(2, (size[1], size[0]))
    ours = module.infer(
        PROMPTS[0],
        control=control,
        control_scale=scale,
        generator=generators("one"),
        scheduler=scheduler,
        return_type="numpy",
        show_progress=False,
        **common,
    )["samples"]
    made = diffusers_pipeline(
        module.parts, StableDiffusionControlNetPipeline, scheduler, controlnet=module.parts.controlnet
    )
    theirs = made(
        PROMPTS[0],
        image=control,
        controlnet_conditioning_scale=scale,
        generator=generators("one"),
        output_type="np",
        **common,
    ).images
    assert np.array_equal(ours, theirs)
