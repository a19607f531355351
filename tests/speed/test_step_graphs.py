"""Recorded steps give the bits of steps that run as they are.

Tracing stands for CUDA: a trace repeats its operations on the tensors that it was recorded with, and runs no Python.
"""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from sdmodule.callbacks.model_flops import CallRecorder
from sdmodule.module import StableDiffusionModule
from sdmodule.speed.step_graphs import recording_steps

PROMPTS = ["a red circle", "a star"]


@pytest.fixture
def sd(few_blocks) -> StableDiffusionModule:
    return few_blocks


class Traces:
    """A recorder whose results are NaNs until a recording has run, and whose recordings share their memory."""

    def __init__(self):
        self.made = 0
        self.runs = 0
        self.outputs = []

    def record(self, run):
        trace = make_fx(run)()
        outputs = [one if one is None else torch.full_like(one, torch.nan) for one in run()]
        self.made += 1
        self.outputs += [one for one in outputs if one is not None]

        def replay():
            self.runs += 1
            for one in self.outputs:  # what an earlier recording returned may be overwritten
                one.fill_(torch.nan)
            for one, new in zip(outputs, trace(), strict=True):
                if one is not None:
                    one.copy_(new)

        return replay, tuple(outputs)


def sampled(sd, prompts=PROMPTS, **settings):
    settings = {"num_inference_steps": 6, **settings}
    return sd.infer(prompts, return_type="latent", show_progress=False, **settings)["samples"]


WINDOW = {"engine": "window", "merge_crossattn": True, "merge_mlp": True}
KINDS = {
    "plain": ({}, 1),
    "interval": ({"speed": {"guidance_interval": [0.0, 0.6]}}, 2),
    "deep": ({"speed": {"cache_every": 2}}, 2),
    "turbo": (
        {"speed": {"cache_every": 2, "guidance_interval": [0.0, 0.75]}, "tome": WINDOW, "scheduler": "dpmpp_2m"},
        3,
    ),
    "exact merging": ({"tome": {"engine": "exact"}}, 1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_have_the_bits_of_others_in_this_batch_and_the_next(sd, kind):
    settings, kinds = KINDS[kind]
    first, second = (sampled(sd, seed=seed, **settings) for seed in (0, 5))
    traces = Traces()
    with recording_steps(sd.unet, traces):
        assert torch.equal(sampled(sd, seed=0, **settings), first)
        assert torch.equal(sampled(sd, seed=5, **settings), second)
    assert 0 < traces.made <= kinds and traces.runs > 6
    assert torch.equal(sampled(sd, seed=0, **settings), first)


def test_recorded_steps_count_as_calls(sd):
    with CallRecorder(sd) as eager:
        sampled(sd)
    traces = Traces()
    with recording_steps(sd.unet, traces), CallRecorder(sd) as recorded:
        sampled(sd)
    assert traces.runs > 0
    assert recorded.calls.total() == eager.calls.total() + traces.made  # to trace a call takes a second one


def test_other_prompts_and_sizes_are_not_those_that_were_recorded(sd):
    long = ["a red circle, " * 30] * 2
    batches = [{"prompts": PROMPTS[::-1]}, {"prompts": long}, {"prompts": PROMPTS, "width": 64}]
    expected = [sampled(sd, num_inference_steps=3, **batch) for batch in batches]
    with recording_steps(sd.unet, Traces()):
        sampled(sd, num_inference_steps=3)
        seen = [sampled(sd, num_inference_steps=3, **batch) for batch in batches]
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


class Fails:
    def record(self, run):
        run()
        raise RuntimeError("operation not permitted when stream is capturing")


def test_a_step_that_cannot_be_recorded_is_said_and_runs_as_it_is(sd, recwarn):
    settings = {"speed": {"cache_every": 2}}
    expected = sampled(sd, **settings)
    with recording_steps(sd.unet, Fails()):
        assert torch.equal(sampled(sd, **settings), expected)
    said = [str(one.message) for one in recwarn if "speed.cuda_graphs" in str(one.message)]
    assert len(said) == 1 and "stream is capturing" in said[0]


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"freeu": {"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}}, "freeu"), ({"tome": {"reuse_steps": 2}}, "reuse_steps")],
    ids=["freeu", "reuse"],
)
def test_what_does_not_fit_is_said(sd, recwarn, settings, name):
    traces = Traces()
    with recording_steps(sd.unet, traces):
        sampled(sd, ["a star"], num_inference_steps=3, **settings)
    assert traces.made == 0
    assert any("speed.cuda_graphs" in str(one.message) and name in str(one.message) for one in recwarn)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_graphs_have_the_bits_of_other_steps(checkpoint, kind, recwarn):
    sd = StableDiffusionModule.from_pretrained(str(checkpoint), sampling={"steps": 6, "guidance_scale": 5.0}).cuda()
    settings, _ = KINDS[kind]
    graphs = {**settings, "speed": {**settings.get("speed", {}), "cuda_graphs": True}}
    assert torch.equal(sampled(sd, **graphs), sampled(sd, **settings))
    assert not [str(one.message) for one in recwarn if "speed.cuda_graphs" in str(one.message)]
