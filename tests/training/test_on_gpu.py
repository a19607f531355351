"""Training on a GPU, with fake CUDA tensors: what a step makes the host wait for, and a loss that is NaN."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback, LightningDataModule
from torch.utils.data import default_collate

from sdmodule.callbacks.checkpoint import TrainingCheckpoint
from sdmodule.callbacks.ema import EMA
from sdmodule.cli.trainer import make_trainer
from sdmodule.data.sampler import training_loader
from sdmodule.errors import SettingsError
from sdmodule.families.conditioning import Conditioning
from sdmodule.module import StableDiffusionModule
from sdmodule.training.autoencoder import AutoencoderModule
from sdmodule.training.optimizers import Optimization
from tests.fake_cuda import fake_cuda, values_of

pytestmark = pytest.mark.slow  # each test trains


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


ALLOWED = {
    "training/upload.py _copied": "random numbers and tokens of the step, in one copy",
    "diffusion/upload.py upload": "the noise of an autoencoder, likewise",
    "training/trainable.py TrainableModule.transfer_batch_to_device": "the next batch, while the GPU computes",
    "training/host_copy.py HostCopy.__init__": "whether the loss is finite, which is read a step later",
}
"""Copies of a step, all from or to pinned memory, so that nobody waits."""

LORA = {"kind": "lora", "rank": 2}
KINDS: dict[str, dict[str, Any]] = {
    "full": {
        "tuning": {"kind": "full", "text_encoder": True},
        "objective": {"prediction_type": "v_prediction", "weighting": "min_snr", "input_perturbation": 0.1},
        "precision": "16-mixed",
    },
    "lora": {"tuning": {**LORA, "dropout": 0.1, "text_encoder": True}},
    "textual inversion": {"tuning": {"kind": "textual_inversion", "placeholder": "<x>", "initializer": "star"}},
    "controlnet": {"tuning": {"kind": "controlnet"}, "data": ["conditioning"]},
    "inpaint": {"task": "inpaint", "training": {"inpaint": {"convert": True}}, "precision": "32-true"},
    "masks": {
        "task": "inpaint",
        "training": {"inpaint": {"convert": True}},
        "objective": {"masked": True},
        "data": ["mask"],
    },
    "cached dreambooth": {"tuning": LORA, "data": ["prior", "moments"]},
    "autoencoder": {},
    "XL": {"tuning": LORA, "data": ["original_size", "crop_top_left"], "objective": {"caption_dropout": 0.5}},
}


class Examples(LightningDataModule):
    """Two batches of two images with all that a kind of training takes."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        masks = [(torch.rand(1, 32, 32, generator=random) < 0.3).float() for _ in range(4)]
        beside = {
            "conditioning": [torch.rand(3, 32, 32, generator=random) for _ in range(4)],
            "mask": masks,
            "prior": [False] * 4,
            "moments": [torch.rand(8, 8, 8, generator=random) for _ in range(4)],
            "original_size": [torch.tensor([32, 40])] * 4,
            "crop_top_left": [torch.tensor([0, 4])] * 4,
        }
        self.examples = [
            {"image": torch.rand(3, 32, 32, generator=random), "caption": f"a red star {k}"}
            | {name: beside[name][k] for name in names}
            for k in range(4)
        ]

    def train_dataloader(self):
        def collate(examples):
            if "prior" in examples[0]:  # the images of the subject come first
                examples = [{**one, "prior": 2 * k >= len(examples)} for k, one in enumerate(examples)]
            return default_collate(examples)

        return training_loader(self.examples, 2, 0, 0, self.trainer, collate=collate)  # type: ignore[arg-type]


class Embeddings:
    """Cached embeddings of any prompt."""

    def __contains__(self, prompt: str) -> bool:
        return True

    def __call__(self, prompts) -> Conditioning:
        return Conditioning(torch.ones(len(prompts), 77, 32))


class Marks(Callback):
    """Where each training step ends among what was recorded, and the loss of each."""

    def __init__(self, cuda: Any = None) -> None:
        self.cuda = cuda
        self.at: list[int] = []
        self.losses: list[float] = []

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self.losses.append(float(values_of(loss.detach())))

    def on_train_batch_end(self, *_: Any) -> None:
        self.at.append(len(self.cuda.crossings) if self.cuda else 0)


class NaNLosses(StableDiffusionModule):
    """A module whose loss is NaN in some steps."""

    nan_at: tuple[int, ...] = ()

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step + 1 in self.nan_at else loss


@contextmanager
def on_gpu(monkeypatch) -> Iterator[Any]:
    with fake_cuda() as cuda, monkeypatch.context() as patched:
        patched.setattr(torch.accelerator, "is_available", lambda: True)  # loaders pin memory for it
        patched.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: SimpleNamespace(type="cuda"))
        patched.setattr(torch.accelerator, "current_stream", lambda: SimpleNamespace(is_capturing=lambda: False))
        yield cuda


def train(folder, module, data, *callbacks, gpu=True, steps=3, precision=None, **settings):
    trainer = make_trainer(
        "gpu" if gpu else "cpu",
        max_steps=steps,
        precision=precision,
        callbacks=[EMA(start_step=1), *callbacks],
        logger=False,
        default_root_dir=folder,
        gradient_clip_val=1.0,
        **{"limit_val_batches": 0, **settings},
    )
    trainer.fit(module, data)
    return trainer


def build(kind, checkpoint, xl_checkpoint):
    settings = {name: value for name, value in KINDS[kind].items() if name not in ("data", "precision")}
    torch.manual_seed(0)
    if kind == "autoencoder":
        return AutoencoderModule(str(checkpoint))
    return StableDiffusionModule(str(xl_checkpoint if kind == "XL" else checkpoint), **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_makes_anyone_wait(checkpoint, xl_checkpoint, tmp_path, monkeypatch, kind):
    names, precision = KINDS[kind].get("data", []), KINDS[kind].get("precision")
    runs = {}
    for gpu in (False, True) if precision == "32-true" else (True,):
        with on_gpu(monkeypatch) if gpu else nullcontext() as cuda:
            module, marks = build(kind, checkpoint, xl_checkpoint), Marks(cuda)
            with module.cached_embeddings(Embeddings()) if "moments" in names else nullcontext():
                train(tmp_path, module, Examples(names), marks, gpu=gpu, precision=precision, steps=2)
        runs[gpu] = marks.losses
    step = cuda.crossings[marks.at[0] : marks.at[1]]  # the first one copies the schedule too
    cuda.check(step)
    assert {one.place for one in step} <= set(ALLOWED), [str(one) for one in step if one.place not in ALLOWED]
    copies = [one.place.partition(" ")[0] for one in step]
    assert sum(copies.count(f"{folder}/upload.py") for folder in ("training", "diffusion")) == 1
    assert copies.count("training/host_copy.py") == 1
    if precision == "32-true":
        assert runs[True][0] == pytest.approx(runs[False][0], rel=1e-6)  # later ones have other gradients


@contextmanager
def nan_losses(checkpoint, folder, monkeypatch, *steps: int, every: int) -> Iterator[tuple[Any, ...]]:
    """A module whose loss is NaN at some steps, on a GPU, and callbacks that record and save."""
    with on_gpu(monkeypatch) as cuda:
        module = NaNLosses(str(checkpoint), tuning=LORA)
        module.nan_at = steps
        settings = {"every_n_train_steps": every, "save_top_k": -1, "save_last": True, "save_on_exception": True}
        yield module, Examples([]), Marks(cuda), TrainingCheckpoint(folder, filename="{step}", **settings)


def load(file) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def same_weights(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


@pytest.mark.parametrize("step", [3, 5])
def test_a_nan_loss_is_found_one_step_later_and_never_learned(checkpoint, tmp_path, monkeypatch, step):
    with nan_losses(checkpoint, tmp_path, monkeypatch, step, every=step - 1) as (module, data, marks, saving):
        with pytest.raises(SettingsError, match=f"loss is NaN or inf at step {step};"):
            train(tmp_path, module, data, marks, saving, steps=5)
    assert len(marks.losses) == min(step + 1, 5)  # at the end, no step later
    last = load(tmp_path / "last.ckpt")
    assert last["global_step"] == step and same_weights(last, load(tmp_path / f"step={step - 1}.ckpt"))
    assert not (tmp_path / f"step={2 * (step - 1)}.ckpt").exists()


def test_a_nan_loss_is_found_before_a_checkpoint_is_written(checkpoint, tmp_path, monkeypatch):
    with nan_losses(checkpoint, tmp_path, monkeypatch, 2, every=1) as (module, data, marks, saving):
        with pytest.raises(SettingsError, match="loss is NaN or inf at step 2;"):
            train(tmp_path, module, data, marks, saving, steps=5)
    assert len(marks.losses) == 2  # what was written after the error is the state without the step
    assert same_weights(load(tmp_path / "step=1.ckpt"), load(tmp_path / "step=2.ckpt"))


def test_steps_with_a_nan_loss_are_skipped_and_counted(checkpoint, tmp_path, monkeypatch):
    with nan_losses(checkpoint, tmp_path, monkeypatch, 2, 4, every=1) as (module, data, marks, saving):
        train(tmp_path, module, data, marks, saving, steps=4, nan_loss="skip")
    steps = [load(tmp_path / f"step={step}.ckpt") for step in range(1, 5)]
    assert [same_weights(before, after) for before, after in pairwise(steps)] == [True, False, True]
    assert [step["callbacks"]["NonFiniteLoss"]["skipped"] for step in steps] == [0, 1, 1, 2]
    optimizers = [step["optimizer_states"][0]["state"][0] for step in steps]
    assert [float(state["step"]) for state in optimizers] == [1, 1, 2, 2]


def test_with_another_optimizer_a_nan_loss_stops_the_training_at_once(checkpoint, tmp_path, monkeypatch):
    """Such an optimizer cannot be told on the device to leave out a step, so the host waits for the loss."""
    with nan_losses(checkpoint, tmp_path, monkeypatch, 3, every=100) as (module, data, marks, saving):
        module.optimization = Optimization(lambda weights: torch.optim.SGD(weights, lr=0.1))
        with pytest.raises(SettingsError, match="loss is NaN or inf at step 3;"):
            train(tmp_path, module, data, marks, saving, steps=5)
    assert len(marks.losses) == 3 and load(tmp_path / "last.ckpt")["global_step"] == 2


class Strict(Callback):
    """From the third step on, torch raises where the host waits for the GPU."""

    def on_train_batch_start(self, trainer, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("error" if trainer.global_step >= 2 else "default")

    def on_train_batch_end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

    def on_exception(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_of_a_real_gpu_waits(checkpoint, xl_checkpoint, tmp_path, kind):
    names, precision = KINDS[kind].get("data", []), KINDS[kind].get("precision")
    module = build(kind, checkpoint, xl_checkpoint)
    with module.cached_embeddings(Embeddings()) if "moments" in names else nullcontext():
        train(tmp_path, module, Examples(names), Strict(), precision=precision, steps=5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_real_gpu_never_learns_a_nan_loss(checkpoint, tmp_path, precision):
    module = NaNLosses(str(checkpoint), tuning=LORA)
    module.nan_at = (3,)
    saving = TrainingCheckpoint(
        tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_on_exception=True
    )
    with pytest.raises(SettingsError, match="loss is NaN or inf at step 3;"):
        train(tmp_path, module, Examples([]), saving, steps=6, precision=precision)
    assert same_weights(load(tmp_path / "step=2.ckpt"), load(tmp_path / "step=3.ckpt"))
