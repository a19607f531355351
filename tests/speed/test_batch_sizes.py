"""What is compiled for one batch serves the batches after it; blocks are traced here, not compiled to machine code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sdmodule.module import StableDiffusionModule
from sdmodule.speed.batch_sizes import PATIENCE, BatchSizes
from sdmodule.speed.speed_settings import SpeedSettings

PROMPTS = ["a red circle", "a star", "a blue heart", "a green square"]
DEEP = {"cache_every": 2, "guidance_interval": [0.0, 0.75]}
WINDOW = {"engine": "window", "merge_crossattn": True, "merge_mlp": True}


@pytest.fixture
def sd(few_blocks) -> StableDiffusionModule:
    return few_blocks


@pytest.fixture
def graphs(monkeypatch, tmp_path) -> list[torch.fx.GraphModule]:
    """The graphs that torch has traced, which then run as they are."""
    made: list[torch.fx.GraphModule] = []

    def backend(graph, inputs, mode=None):
        graph.meta["mode"] = mode
        made.append(graph)
        return graph.forward

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("sdmodule.speed.compile.BACKEND", backend)
    torch._dynamo.reset()
    yield made
    torch._dynamo.reset()


def images(sd, prompts, seed=0, **settings):
    speed = {"compile": "blocks", **settings.pop("speed", {})}
    return sd.infer(prompts, seed=seed, speed=speed, return_type="numpy", show_progress=False, **settings)["samples"]


@pytest.mark.parametrize(("speed", "tome"), [({}, None), (DEEP, WINDOW)], ids=["rounding", "turbo"])
def test_a_smaller_last_batch_compiles_nothing(sd, graphs, speed, tome):
    images(sd, PROMPTS, speed=speed, tome=tome)
    for_four = len(graphs)
    whole = images(sd, PROMPTS, seed=4, speed=speed, tome=tome)
    seen = []
    count = {"callback_on_step_end": lambda step, latents: seen.append(len(latents))}
    last = images(sd, PROMPTS[:2], seed=4, speed=speed, tome=tome, **count)
    assert len(graphs) == for_four > 0
    assert seen == [2, 2, 2]
    assert np.array_equal(last, whole[:2])  # to the bit, whatever fills the batch


def test_a_longer_prompt_compiles_nothing_and_keeps_its_image(sd, graphs):
    long = "a red circle, " * 30
    images(sd, ["a star"])
    for_short = len(graphs)
    compiled = images(sd, [long])
    assert len(graphs) == for_short > 0
    assert np.abs(compiled - images(sd, [long], speed={"compile": "none"})).max() < 2 / 255


def test_attention_backends_share_no_graph(sd, graphs):
    counts = []
    for name in ("math", "flash", "math", "flash"):
        images(sd, ["a star"], speed={"attention": name})
        counts.append(len(graphs))
    assert counts[0] < counts[1] == counts[2] == counts[3]
    asked = [str(node.args) for graph in graphs for node in graph.graph.nodes if "_backend_from_string" in str(node)]
    assert {"('MATH',)", "('FLASH_ATTENTION',)"} <= set(asked)


def test_autotuned_blocks_are_compiled_in_that_mode(sd, graphs):
    images(sd, ["a star"], speed={"compile": "autotuned"}, num_inference_steps=1)
    assert {graph.meta["mode"] for graph in graphs} == {"max-autotune-no-cudagraphs"}


def test_hitting_the_limit_is_said_once(sd, graphs, monkeypatch, recwarn):
    monkeypatch.setattr("sdmodule.speed.compile.RECOMPILE_LIMIT", 1)
    with torch._dynamo.config.patch(recompile_limit=1):
        images(sd, ["a star"])
    said = [str(warning.message) for warning in recwarn if "speed.compile" in str(warning.message)]
    assert len(said) == 1 and "its limit" in said[0]


def test_a_size_that_comes_again_and_again_is_compiled():
    sizes, shape = BatchSizes(), (4, 8, 8)
    assert sizes.rows(shape, 4) == 4 and sizes.rows((4, 16, 16), 2) == 2
    assert [sizes.rows(shape, 2) for _ in range(PATIENCE)] == [4] * PATIENCE
    assert sizes.rows(shape, 2) == 2 and sizes.rows(shape, 1) == 2 and sizes.rows(shape, 5) == 5


def test_little_work_is_not_compiled():
    settings = SpeedSettings(compile="auto")
    assert settings.compile_on("cuda", work=50.0) == "none" and settings.compile_on("cuda", work=1e5) == "blocks"
    assert settings.compile_on("cpu", work=1e5) == "none"
    assert SpeedSettings(compile="blocks").compile_on("cuda", work=1.0) == "blocks"
