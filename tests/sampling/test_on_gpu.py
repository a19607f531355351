"""What fake CUDA tensors cannot show of sampling: the kernels of a GPU."""

from __future__ import annotations

import pytest
import torch

from sdmodule.components.checkpoint import Components
from sdmodule.errors import SettingsError
from sdmodule.sampling.infer import infer
from sdmodule.sampling.settings import SamplingSettings
from sdmodule.speed.speed_settings import ATTENTION
from tests.sampling.test_no_waiting import COMMON, KINDS, MERGED, PROMPT, moved, sample, small_models

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def models(checkpoint) -> dict[str, dict[str, Components]]:
    """The models on the CPU, and on the GPU by dtype."""
    on_cpu = small_models(checkpoint)
    return {"cpu": on_cpu, **{name: moved(on_cpu, "cuda", dtype) for name, dtype in DTYPES.items()}}


@pytest.fixture
def exact_float32(monkeypatch) -> None:
    """Float32 without TF32, as ``speed=exact`` computes."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_waits_after_the_first_step(models, kind, dtype):
    model, task, settings = KINDS[kind]

    def forbid_waiting(step: int, latents: torch.Tensor) -> None:
        torch.cuda.set_sync_debug_mode("error")

    settings = {**COMMON, **settings, "callback_on_step_end": forbid_waiting}
    try:
        latents = infer(models[dtype][model], SamplingSettings(), task, PROMPT, **settings)["samples"]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert latents.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_float32_has_the_latents_of_the_cpu(models, exact_float32, kind):
    model, task, settings = KINDS[kind]
    expected, _ = sample(models["cpu"][model], task, settings)
    latents, _ = sample(models["float32"][model], task, settings)
    assert (latents.cpu() - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize("engine", ["exact", "window"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_merging_gives_the_same_twice(models, engine, dtype):
    tome = {**MERGED, "engine": engine, "merge_mlp": True}
    first, *others = [sample(models[dtype]["usual"], "text2image", {"tome": tome})[0] for _ in range(4)]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTION)
def test_an_attention_backend_samples_and_decodes_or_says_that_it_cannot(models, name, dtype):
    def images(attention: str) -> torch.Tensor:
        settings = {"num_inference_steps": 2, "return_type": "tensor", "show_progress": False}
        settings["speed"] = {"attention": attention}
        return infer(models[dtype]["usual"], SamplingSettings(), "text2image", PROMPT, **settings)["samples"]

    expected = images("sdpa")
    try:
        sampled = images(name)
    except SettingsError as error:
        assert "no such kernel" in str(error) or "not in this build" in str(error) or "not installed" in str(error)
        return
    assert (sampled - expected).abs().mean() < 0.02
