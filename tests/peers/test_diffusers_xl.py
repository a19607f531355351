"""``infer`` equals ``StableDiffusionXLPipeline``, pixel for pixel, over a grid of its arguments."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdmodule.components.schedulers import SHORT_NAMES, make_scheduler
from sdmodule.module import StableDiffusionModule
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
