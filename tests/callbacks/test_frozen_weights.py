"""Frozen weights are in 16 bits during training steps only, and restored whatever happens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from lightning import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from sdmodule.callbacks.frozen_weights import CastFrozenWeights, sampling_precision
from sdmodule.callbacks.validation_samples import ValidationSamples
from sdmodule.components.checkpoint import load_components
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.module import StableDiffusionModule
from tests.fake_cuda import fake_cuda, values_of
from tests.fitting import fit

pytestmark = pytest.mark.slow  # each test trains several times


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


LORA = {"kind": "lora", "rank": 2}
WORD = {"kind": "textual_inversion", "placeholder": "<x>", "initializer": "star"}


class Recorder(Callback):
    """Records dtypes of the weights during steps and validation, and losses; fails after ``stop`` steps."""

    def __init__(self, stop: int | None = None) -> None:
        self.dtypes: dict[str, dict[str, torch.dtype]] = {}
        self.channels_last: list[bool] = []
        self.losses: list[float] = []
        self.stop = stop

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self.dtypes["step"] = {name: weight.dtype for name, weight in pl_module.named_parameters()}
        self.values = {name: weight.detach().clone() for name, weight in pl_module.named_parameters()}
        frozen = [weight for weight in pl_module.unet.parameters() if weight.ndim == 4]
        self.channels_last = [weight.is_contiguous(memory_format=torch.channels_last) for weight in frozen]
        self.losses.append(float(loss))
        if len(self.losses) == self.stop:
            raise RuntimeError("stop")

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self.dtypes["validation"] = {name: weight.dtype for name, weight in pl_module.named_parameters()}


def train(checkpoint, *callbacks, tuning=LORA, precision="bf16-mixed", sanity=0, **settings):
    torch.manual_seed(0)
    module = StableDiffusionModule(
        str(checkpoint), tuning=tuning, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4), sampling={"steps": 1}
    )
    before = {name: weight.detach().clone() for name, weight in module.named_parameters() if not weight.requires_grad}
    recorder = Recorder(**settings)
    data = ShapesDataModule(batch_size=2, train_length=8, val_length=2, size=32)
    try:
        fit(
            module,
            data,
            4,
            *callbacks,
            recorder,
            precision=precision,
            val_check_interval=2,
            num_sanity_val_steps=sanity,
        )
    finally:
        after = dict(module.named_parameters())
        assert all(torch.equal(after[name], weight) and after[name].is_contiguous() for name, weight in before.items())
        assert {type(part).__module__.partition(".")[0] for part in module.unet.modules()} <= {
            "torch",
            "diffusers",
            "peft",
        }
    return module, recorder


def test_frozen_weights_are_bfloat16_in_steps_and_float32_in_validation(checkpoint, tmp_path):
    module, seen = train(checkpoint, CastFrozenWeights(), ValidationSamples(tmp_path, num_prompts=1))
    step = seen.dtypes["step"]
    for name, dtype in step.items():
        cast = "norm" not in name and "lora" not in name and "embedding." not in name.replace("time_embedding.", "")
        assert dtype == (torch.bfloat16 if cast else torch.float32), name
        if cast:
            assert torch.equal(seen.values[name], dict(module.named_parameters())[name].to(dtype)), name
    assert all(seen.channels_last)
    assert {type(one) for one in module.unet.attn_processors.values()} == {AttnProcessor2_0}  # as before training
    assert set(seen.dtypes["validation"].values()) == {torch.float32}
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.mark.parametrize("tuning", [LORA, {"kind": "full"}, WORD], ids=str)
def test_casting_does_not_change_the_training(checkpoint, tuning):
    """Up to the order in which convolutions sum, which depends on the memory layout."""
    one, cast = train(checkpoint, CastFrozenWeights(), tuning=tuning)
    other, plain = train(checkpoint, tuning=tuning)
    assert cast.losses == pytest.approx(plain.losses, rel=2e-3)
    trained = {name for name, weight in other.named_parameters() if weight.requires_grad}
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert max(float((ours[name] - theirs[name]).abs().mean()) for name in trained) < 1e-4


@pytest.mark.parametrize(("tuning", "precision"), [(LORA, "32-true"), ({**LORA, "method": "dora"}, "bf16-mixed")])
def test_full_precision_and_dora_are_not_cast(checkpoint, tuning, precision):
    _, seen = train(checkpoint, CastFrozenWeights(), tuning=tuning, precision=precision)
    assert {dtype for name, dtype in seen.dtypes["step"].items() if "unet" in name} == {torch.float32}


def test_infer_and_save_pretrained_use_float32_in_the_middle_of_training(checkpoint, tmp_path):
    class InferAndSave(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_) -> None:
            assert pl_module.vae.dtype == torch.bfloat16
            self.image = pl_module.infer("a star", return_type="tensor", show_progress=False)["samples"]
            pl_module.save_pretrained(tmp_path)
            assert pl_module.vae.dtype == torch.bfloat16

    infer_and_save = InferAndSave()
    module, _ = train(checkpoint, CastFrozenWeights(), infer_and_save, tuning={"kind": "full"})
    later = module.infer("a star", return_type="tensor", show_progress=False)["samples"]
    assert torch.allclose(
        infer_and_save.image, later, atol=1e-4
    )  # another attention, but weights that were never rounded
    written = load_components(str(tmp_path)).vae.state_dict()
    assert all(torch.equal(weight, written[name]) for name, weight in module.vae.state_dict().items())


def test_a_sanity_check_before_training_changes_nothing(checkpoint):
    """Lightning's sanity check validates before the first step."""
    train(checkpoint, CastFrozenWeights(), sanity=1)


def test_an_error_restores_the_weights(checkpoint):
    with pytest.raises(RuntimeError, match="stop"):
        train(checkpoint, CastFrozenWeights(), stop=3)


def test_a_gpu_gets_the_original_weights_back_from_pinned_memory(checkpoint):
    """They are copied down once, and up without a wait; what was in 16 bits is made again on the GPU."""
    module = StableDiffusionModule(str(checkpoint), tuning=LORA)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    with fake_cuda() as cuda:
        module.to("cuda")
        with module.frozen_weights.cast(torch.bfloat16):
            start = len(cuda.crossings)
            with module.frozen_weights.full_precision():
                after = {name: values_of(weight.detach()).clone() for name, weight in module.named_parameters()}
            assert module.unet.conv_in.weight.dtype == torch.bfloat16
            moved = cuda.crossings[start:]
        module.to("cpu")
    assert {(one.kind, one.waits) for one in moved} == {("to device", False)}
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_a_gpu_samples_in_the_precision_of_the_training(checkpoint):
    module = StableDiffusionModule(str(checkpoint), tuning=LORA)
    seen = []

    def look(step: int, latents: torch.Tensor) -> None:
        seen.append((module.unet.conv_in.weight.dtype, torch.is_autocast_enabled("cuda")))

    with fake_cuda():
        module.to("cuda")
        strategy = SingleDeviceStrategy(torch.device("cuda", 0))
        trainer = SimpleNamespace(precision="bf16-mixed", strategy=strategy)
        with sampling_precision(trainer, module):
            module.infer("a star", num_inference_steps=1, show_progress=False, callback_on_step_end=look)
        module.infer("a star", num_inference_steps=1, show_progress=False, callback_on_step_end=look)
        module.to("cpu")
    assert seen == [(torch.bfloat16, True), (torch.float32, False)]
