"""Guidance and the scheduler's step in one function give the latents of the scheduler of diffusers."""

from __future__ import annotations

import pytest
import torch

from sdmodule.components.schedulers import CLASSES, SHORT_NAMES, make_scheduler
from sdmodule.diffusion.guidance import classifier_free_guidance, rescale_guidance
from sdmodule.diffusion.linear_steps import linear_steps
from sdmodule.diffusion.sampler import denoise, step_arguments
from sdmodule.module import StableDiffusionModule
from sdmodule.speed.fused_step import fused_steps, fusing_steps
from sdmodule.speed.step_graphs import recording_steps
from tests.speed.test_step_graphs import Traces

BASE = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PROMPTS = ["a red circle", "a star", "a blue heart", "a green square"]
DPM_SDE = {"name": "dpmpp_2m", "algorithm_type": "sde-dpmsolver++"}
THIRD_ORDER = {"name": "unipc", "solver_order": 3}
ZERO_SNR = {"name": "ddim", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def as_it_is(function):
    """In the place of a compiler."""
    return function


def predictions(latents):
    """Two predictions that depend on latents, ``[2B, C, h, w]``."""
    mixed = latents.roll(1, -1) - 0.5 * latents.roll(1, -2)
    return torch.cat([latents.tanh(), (0.3 * mixed).sin() + 0.1 * latents])


def trajectory(wanted, base, begin, steps, eta, rescale, change, fuses):
    """Latents after each step."""
    scheduler = make_scheduler(wanted, base)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    latents = 5 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    network = torch.nn.Identity()
    with fusing_steps(network, as_it_is):
        fused = fused_steps(network, scheduler, timesteps, eta, (4.0, rescale), latents.device) if fuses else None
    assert (fused is None) != fuses

    def predict(latents, timestep):
        both = predictions(latents)
        if fuses:
            return both
        unconditional, conditional = both.chunk(2)
        guided = classifier_free_guidance(unconditional, conditional, 4.0)
        return rescale_guidance(guided, conditional, rescale) if rescale else guided

    seen = []

    def on_step(step, latents):
        seen.append(latents.clone())
        return change(step, latents)

    denoise(predict, latents, scheduler, generators, eta, timesteps=timesteps, on_step=on_step, fused=fused)
    return seen, [one.get_state() for one in generators]


def unchanged(step, latents):
    return None


def changed(step, latents):
    """What inpainting by 4 channels and callbacks do: other latents, or others in place."""
    if step % 3 == 1:
        return latents.flip(-1)
    if step % 3 == 2:
        latents[:, :, :4] = 0.5
    return None


@pytest.mark.parametrize("wanted", [*SHORT_NAMES, DPM_SDE, THIRD_ORDER], ids=str)
@pytest.mark.parametrize(
    ("prediction_type", "begin", "steps", "rescale", "change"),
    [("epsilon", 0, 25, 0.0, unchanged), ("v_prediction", 6, 13, 0.7, changed), ("epsilon", 0, 3, 0.7, unchanged)],
    ids=["whole", "from the middle, changed", "three steps"],
)
def test_each_step_is_that_of_the_scheduler(wanted, prediction_type, begin, steps, rescale, change):
    base = {**BASE, "prediction_type": prediction_type}
    given = (wanted, base, begin, steps, 0.6, rescale, change)
    (seen, states), (expected, others) = (trajectory(*given, fuses=fuses) for fuses in (True, False))
    assert len(seen) == len(expected) > 1
    for one, other in zip(seen, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    assert all(torch.equal(one, other) for one, other in zip(states, others, strict=True))


def test_most_schedulers_are_linear_and_those_that_clip_are_not():
    def combined(wanted):
        scheduler = make_scheduler(wanted, BASE)
        scheduler.set_timesteps(20)
        return linear_steps(scheduler, scheduler.timesteps, **step_arguments(scheduler, 0.0, torch.Generator()))

    expected = set(CLASSES) - {"PNDMScheduler", "DPMSolverSDEScheduler"}  # Runge-Kutta; noise of its own
    assert {name for name in CLASSES if combined(name) is not None} == expected
    assert combined({"name": "ddim", "clip_sample": True}) is None
    assert combined({"name": "dpmpp_2m", "thresholding": True}) is None
    assert combined(ZERO_SNR | {"prediction_type": "v_prediction"}) is not None
    few = combined("dpmpp_2m")
    assert few.latent_lags == (0, 1) and few.prediction_lags == (1,) and not few.own and not any(few.draws)


KINDS = {
    "turbo": ({"cache_every": 2, "guidance_interval": [0.0, 0.75]}, {"scheduler": "dpmpp_2m"}, 2),
    "unipc": ({}, {"scheduler": "unipc", "guidance_rescale": 0.7}, 1),
    "ancestral": ({}, {"scheduler": "euler_a"}, 1),
    "part of the schedule": ({}, {"scheduler": "ddim", "eta": 0.5, "denoising_end": 0.5}, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_batches_share_what_is_compiled_and_have_the_latents_of_others(few_blocks, kind):
    speed, settings, most = KINDS[kind]
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def latents(seed, prompts=PROMPTS):
        given = {"speed": speed, "num_inference_steps": 8, "return_type": "latent", "show_progress": False, **settings}
        return few_blocks.infer(prompts, seed=seed, **given)["samples"]

    expected = [latents(seed) for seed in (0, 4)]
    torch._dynamo.reset()
    with fusing_steps(few_blocks.unet, torch.compile(dynamic=False, backend=backend)):
        seen = [latents(seed) for seed in (0, 4)]
    assert 0 < len(graphs) <= most
    for one, other in zip(seen, expected, strict=True):
        assert not torch.equal(one, other) and (one - other).norm() <= 1e-5 * other.norm()
    assert torch.equal(latents(0), expected[0])  # as before


def test_recorded_steps_are_fused_too(few_blocks):
    settings = {"num_inference_steps": 6, "return_type": "latent", "show_progress": False, "scheduler": "unipc"}
    settings["speed"] = {"cache_every": 2, "guidance_interval": [0.0, 0.6]}
    with fusing_steps(few_blocks.unet, as_it_is):
        expected = few_blocks.infer(PROMPTS, **settings)["samples"]
        traces = Traces()
        with recording_steps(few_blocks.unet, traces):
            seen = few_blocks.infer(PROMPTS, **settings)["samples"]
    assert traces.runs > 0 and torch.equal(seen, expected)


def test_clipped_samples_are_stepped_by_the_scheduler(few_blocks):
    settings = {"num_inference_steps": 3, "return_type": "latent", "show_progress": False}
    settings["scheduler"] = {"name": "ddim", "clip_sample": True}
    expected = few_blocks.infer("a star", **settings)["samples"]
    with fusing_steps(few_blocks.unet, as_it_is):
        assert torch.equal(few_blocks.infer("a star", **settings)["samples"], expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("graphs", [False, True], ids=["launched", "recorded"])
@pytest.mark.parametrize("scheduler", SHORT_NAMES)
def test_on_a_gpu_compiled_steps_are_near_those_of_the_scheduler(checkpoint, scheduler, graphs):
    sd = StableDiffusionModule.from_pretrained(str(checkpoint), sampling={"steps": 6, "guidance_scale": 5.0}).cuda()
    settings = {"scheduler": scheduler, "return_type": "latent", "show_progress": False}
    expected = sd.infer(PROMPTS, **settings)["samples"]
    seen = sd.infer(PROMPTS, speed={"compile": "blocks", "cuda_graphs": graphs}, **settings)["samples"]
    assert (seen - expected).norm() <= 0.01 * expected.norm()
