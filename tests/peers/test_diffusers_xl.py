"""``infer`` equals the pipelines of diffusers for Stable Diffusion XL, pixel for pixel, over a grid of arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLControlNetPipeline, StableDiffusionXLInpaintPipeline

from sdmodule.components.controlnet import controlnet_from_unet
from sdmodule.components.inpaint_unet import convert_to_inpaint
from sdmodule.components.save import save_components, save_model
from sdmodule.components.schedulers import SHORT_NAMES, make_scheduler
from sdmodule.module import StableDiffusionModule
from tests.peers.test_diffusers import grid
from tests.reported.drawing import ramp, strokes
from tests.xl_parts import xl_pipeline

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle on a blue background", "a star"]
GRID = [
    # steps, size, guidance, negative prompts, one generator or one for each
    (1, (32, 32), 1.0, None, "one"),
    (2, (24, 40), 3.0, ["blurred", "a dark blue square"], "each"),
    (5, (40, 24), 5.0, None, "each"),
]


@pytest.fixture(scope="module")
def xl(xl_checkpoint) -> StableDiffusionModule:
    return StableDiffusionModule.from_pretrained(xl_checkpoint)


@pytest.fixture(scope="module")
def pipeline(xl_checkpoint):
    return xl_pipeline(xl_checkpoint)


def generators(kind):
    return torch.Generator().manual_seed(5) if kind == "one" else [torch.Generator().manual_seed(k) for k in (5, 6)]


@pytest.mark.parametrize(("steps", "size", "guidance", "negative", "kind"), GRID)
@pytest.mark.parametrize("scheduler", SHORT_NAMES)
def test_text_to_image(xl, pipeline, scheduler, steps, size, guidance, negative, kind):
    common = {"height": size[0], "width": size[1], "num_inference_steps": steps, "guidance_scale": guidance}
    common["negative_prompt"] = negative
    ours = xl.infer(
        PROMPTS, generator=generators(kind), scheduler=scheduler, return_type="numpy", show_progress=False, **common
    )["samples"]
    pipeline.scheduler = make_scheduler(scheduler, xl.parts.scheduler.config)
    theirs = pipeline(PROMPTS, generator=generators(kind), output_type="np", **common).images
    assert np.array_equal(ours, theirs)


def test_the_checkpoints_own_scheduler_is_the_default(xl, xl_checkpoint):
    ours = xl.infer(PROMPTS, num_inference_steps=4, return_type="numpy", seed=5, show_progress=False)["samples"]
    made = xl_pipeline(xl_checkpoint)
    theirs = made(PROMPTS, num_inference_steps=4, generator=generators("each"), output_type="np").images
    assert np.array_equal(ours, theirs)


# --------------------------------------------------------------------------------------------- inpainting, ControlNet


@pytest.fixture(scope="module")
def inpaint_checkpoint(xl, tmp_path_factory):
    """The checkpoint with a UNet of 9 channels whose new weights are not zero."""
    folder = tmp_path_factory.mktemp("xl_inpaint")
    parts = StableDiffusionModule.from_pretrained(xl.parts.source).parts
    convert_to_inpaint(parts.unet)
    noise = torch.randn(parts.unet.conv_in.weight[:, 4:].shape, generator=torch.Generator().manual_seed(0))
    parts.unet.conv_in.weight.data[:, 4:] = 0.1 * noise
    save_components(parts, folder)
    return folder


@pytest.fixture(scope="module", params=[4, 9])
def inpainting(request, xl_checkpoint, inpaint_checkpoint):
    folder = xl_checkpoint if request.param == 4 else inpaint_checkpoint
    module = StableDiffusionModule.from_pretrained(folder, task="inpaint")
    return module, xl_pipeline(folder, kind=StableDiffusionXLInpaintPipeline)


@pytest.mark.parametrize(
    ("scheduler", "strength", "steps", "guidance"), grid(list(SHORT_NAMES), [1.0, 0.6], [4, 7], [1.0, 4.0])
)
def test_the_masked_area(inpainting, scheduler, strength, steps, guidance):
    module, pipeline = inpainting
    photo, mask = ramp(size=(32, 32)), strokes((0, 0, 0), (255, 255, 255)).resize((32, 32))
    common = {"num_inference_steps": steps, "guidance_scale": guidance}
    settings = {"scheduler": scheduler, "inpaint": {"strength": strength}, "show_progress": False}
    ours = module.infer(PROMPTS[0], photo, mask, generator=generators("one"), **settings, **common)["samples"][0]
    pipeline.scheduler = make_scheduler(scheduler, module.parts.scheduler.config)
    given = {"image": photo, "mask_image": mask, "height": 32, "width": 32, "strength": strength}
    theirs = pipeline(PROMPTS[0], generator=generators("one"), **given, **common).images[0]
    inside = np.asarray(mask.convert("L")) > 127
    assert np.array_equal(np.asarray(ours)[inside], np.asarray(theirs)[inside])


@pytest.fixture(scope="module")
def controlled(xl, tmp_path_factory):
    """A module with a ControlNet, and its folder."""
    folder = tmp_path_factory.mktemp("xl_control")
    net = controlnet_from_unet(xl.parts)
    generator = torch.Generator().manual_seed(0)
    for weight in net.parameters():
        weight.data += 0.05 * torch.randn(weight.shape, generator=generator)
    save_model(net, folder)
    return StableDiffusionModule.from_pretrained(xl.parts.source, components={"controlnet": folder})


@pytest.mark.parametrize(
    ("scheduler", "scale", "size", "guidance"),
    grid(["ddim", "euler_a", "unipc"], [0.4, 1.7], [(32, 32), (24, 40)], [1.0, 4.0]),
)
def test_a_controlnet(controlled, scheduler, scale, size, guidance):
    common = {"height": size[0], "width": size[1], "num_inference_steps": 3, "guidance_scale": guidance}
    control = ramp(2, (size[1], size[0]))
    settings = {"control": control, "control_scale": scale, "return_type": "numpy", "show_progress": False}
    ours = controlled.infer(PROMPTS[0], generator=generators("one"), scheduler=scheduler, **settings, **common)
    made = xl_pipeline(
        controlled.parts.source,
        scheduler,
        kind=StableDiffusionXLControlNetPipeline,
        controlnet=controlled.parts.controlnet,
    )
    given = {"image": control, "controlnet_conditioning_scale": scale, "output_type": "np"}
    theirs = made(PROMPTS[0], generator=generators("one"), **given, **common).images
    assert np.array_equal(ours["samples"], theirs)
