"""Fused optimizers, activation checkpointing, schedules, and the checks of their settings."""

from __future__ import annotations

import shutil
from functools import partial
from importlib.util import find_spec

import pytest
import torch

from sdmodule.cli.main import train_main
from sdmodule.components.checkpoint import load_components
from sdmodule.errors import SettingsError
from sdmodule.module import StableDiffusionModule
from sdmodule.training.optimizers import build_optimizer

pytestmark = pytest.mark.slow  # each test trains


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


@pytest.mark.parametrize(
    ("make", "allowed", "fused"),
    [
        (torch.optim.AdamW, True, True),
        (partial(torch.optim.Adam, lr=1e-3), True, True),
        (torch.optim.AdamW, False, None),
        (partial(torch.optim.AdamW, foreach=True), True, None),
        (partial(torch.optim.AdamW, fused=False), True, False),
    ],
)
def test_adam_is_fused_by_default(make, allowed, fused):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(make, [weight], allowed)
    assert optimizer.defaults["fused"] is fused
    weight.grad = torch.ones(3)
    optimizer.step()
    assert (weight < 1).all()


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16", "16-mixed"])
def test_fused_optimizers_clip_gradients_in_mixed_precision(call, checkpoint, photos, tmp_path, precision):
    """Clipped far below AdamW's epsilon, gradients leave the weights where they are."""
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", "trainer.max_steps=1", "callbacks=[export]"]
    settings += [f"trainer.precision={precision}", "model.optimizer.lr=0.1", "model.optimizer.weight_decay=0"]
    settings += ["trainer.limit_val_batches=0", "logger=none"]

    def trained(limit):
        folder = tmp_path / str(limit)
        call(train_main, *settings, f"trainer.gradient_clip_val={limit}", f"output_dir={folder}")
        return load_components(str(folder / "export")).unet.state_dict()

    before = load_components(str(checkpoint)).unet.state_dict()
    moved = {limit: [float((new - before[k]).abs().max()) for k, new in trained(limit).items()] for limit in (1, 1e-12)}
    assert max(moved[1]) > 0.09
    assert max(moved[1e-12]) < 1e-3


def test_other_optimizers_are_left_alone():
    assert isinstance(build_optimizer(torch.optim.SGD, [torch.nn.Parameter(torch.ones(1))]), torch.optim.SGD)


def test_activation_checkpointing_does_not_change_gradients(two_level_checkpoint):
    def gradients(which):
        module = StableDiffusionModule(str(two_level_checkpoint), training={"checkpointing": which})
        batch = {"image": torch.zeros(2, 3, 32, 32), "caption": ["a", "b"]}
        module.log = lambda *_, **__: None
        module.training_step(batch, 0).backward()
        kept = [
            {layer.gradient_checkpointing for layer in block.modules() if hasattr(layer, "gradient_checkpointing")}
            for block in (*module.unet.down_blocks, *module.unet.up_blocks)
        ]
        return kept, [weight.grad for weight in module.unet.parameters()]

    (none, plain), (outer, some), (every, all_) = map(gradients, ("none", "outer", "all"))
    off, on = {False}, {True}
    assert (none, outer, every) == ([off] * 4, [on, off, off, on], [on] * 4)
    for ours in (some, all_):
        assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(plain, ours, strict=True))


@pytest.mark.skipif(find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_unknown_checkpointing_and_a_missing_optimizer_package_are_named_in_the_error(
    call, checkpoint, photos, tmp_path
):
    with pytest.raises(SettingsError, match=r"training\.checkpointing=some"):
        StableDiffusionModule(str(checkpoint), training={"checkpointing": "some"})
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    status, _, error = call(train_main, *settings, "model.optimizer._target_=bitsandbytes.optim.AdamW8bit")
    assert status == 1 and "pip install 'sdmodule[bitsandbytes]'" in error and "Traceback" not in error


BAD_SCHEDULE = "model.lr_scheduler={_target_: torch.optim.lr_scheduler.StepLR, _partial_: true, steps: 3}"


SCHEDULERS = "torch.optim.lr_scheduler"
PLATEAU = f"model.lr_scheduler={{_target_: {SCHEDULERS}.ReduceLROnPlateau, _partial_: true}}"
SHORT = f"model.lr_scheduler={{_target_: {SCHEDULERS}.OneCycleLR, _partial_: true, max_lr: 1e-4, total_steps: 999}}"


@pytest.mark.parametrize("model", ["text2image", "autoencoder"])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("model.optimizer.lr=fast", "these settings cannot be used"),
        ("model.optimizer.lr=-1", "these settings cannot be used"),
        ("+model.optimizer.speed=1", "these settings cannot be used"),
        (BAD_SCHEDULE, "these settings cannot be used"),
        (PLATEAU, "ReduceLROnPlateau follows a metric"),
        (SHORT, "OneCycleLR ends after 999 of trainer.max_steps=1000"),
    ],
)
def test_settings_that_an_optimizer_refuses_are_reported_before_anything_is_written(
    checkpoint, photos, tmp_path, call, model, wrong, words
):
    out = tmp_path / "out"
    settings = [f"model={model}", f"pretrained={checkpoint}", f"data.root={photos}", f"output_dir={out}"]
    status, _, error = call(train_main, *settings, wrong)
    assert status == 1 and words in error and error.count("\n") == 1 and not out.exists()


TWO_RATES = f"{{_target_: {SCHEDULERS}.OneCycleLR, _partial_: true, max_lr: [1e-4, 1e-5], total_steps: 2}}"


MUON = ["tuning=lora", "~model.optimizer.betas", "model.optimizer._target_=torch.optim.Muon"]
TWO_GROUPS = ["tuning.text_encoder=true", "tuning.text_encoder_lr=1e-5", f"model.lr_scheduler={TWO_RATES}"]
NEEDS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9 has no Muon")


@pytest.mark.parametrize("settings", [pytest.param(MUON, marks=NEEDS_MUON), TWO_GROUPS], ids=["muon", "groups"])
def test_optimizers_and_schedules_fit_the_parameter_groups(checkpoint, photos, tmp_path, call, settings):
    common = [f"pretrained={checkpoint}", f"data.root={photos}", f"output_dir={tmp_path / 'out'}", "callbacks=[]"]
    status, _, error = call(train_main, *common, "resolution=32", "trainer.max_steps=2", *settings)
    assert (status, error) == (0, "")


TEXT_ENCODER = ["tuning.text_encoder=true", "tuning.text_encoder_lr=1e-5"]
STEPS = f"model.lr_scheduler={{_target_: {SCHEDULERS}.StepLR, _partial_: true, step_size: 1}}"


def small(checkpoint, photos, out):
    common = [f"pretrained={checkpoint}", f"data.root={photos}", f"output_dir={out}", "resolution=32"]
    return [*common, "callbacks=[checkpoint]", "logger=none", "trainer.limit_val_batches=1"]


@pytest.fixture(scope="module")
def trainings():
    return {}


@pytest.fixture
def trained(call, checkpoint, photos, trainings, tmp_path_factory):
    """The folder of a training of two steps, made once for each list of settings."""

    def train(settings):
        key = tuple(settings)
        if key not in trainings:
            out = tmp_path_factory.mktemp("trained") / "out"
            assert call(train_main, *small(checkpoint, photos, out), "trainer.max_steps=2", *settings)[0] == 0
            trainings[key] = out
        return trainings[key]

    return train


def one_cycle(steps: int) -> str:
    return SHORT.replace("999", str(steps))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (["tuning.text_encoder=true", "tuning.text_encoder_lr=1e-5"], ["tuning.text_encoder=true"], "is not AdamW"),
        ([], ["model.optimizer._target_=torch.optim.Adagrad", "~model.optimizer.betas"], "is not Adagrad"),
        ([], ["model.optimizer._target_=torch.optim.Adamax"], "is not Adamax"),
        ([one_cycle(2)], [one_cycle(4)], "trainer.max_steps=4: the checkpoint's OneCycleLR ends after 2 steps"),
        ([], ["model.optimizer.lr=2e-5"], "model.optimizer.lr=2e-05: the checkpoint has 1e-05"),
        ([], ["model.optimizer.weight_decay=0"], "keeps it; give 0.01"),
        (TEXT_ENCODER, [TEXT_ENCODER[0], "tuning.text_encoder_lr=1e-6"], "tuning.text_encoder_lr=1e-06: the"),
        ([STEPS], ["model.optimizer.lr=2e-5", STEPS], "model.optimizer.lr=2e-05: the checkpoint"),
        (
            [STEPS],
            [STEPS.replace("1}", "9}")],
            "step_size=9: the checkpoint has 1",
        ),
        ([STEPS], [], "the checkpoint was trained with one, and none is given"),
        ([], [STEPS], "the checkpoint was trained without one"),
    ],
    ids=[
        *("groups", "optimizer", "optimizer with the same settings", "schedule", "rate", "decay", "text encoder rate"),
        *("rate of a schedule", "settings of a schedule", "no schedule", "new schedule"),
    ],
)
def test_a_checkpoint_of_another_optimizer_is_told_of(checkpoint, photos, trained, call, before, after, words):
    out = trained(before)
    same = [*small(checkpoint, photos, out), "trainer.max_steps=4", "ckpt_path=last"]
    held = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    status, _, error = call(train_main, *same, *after)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == held, "nothing is written"
    assert status == 1 and words in error and error.count("\n") == 1 and "Traceback" not in error


@pytest.mark.parametrize("settings", [[], TEXT_ENCODER, [STEPS]], ids=["rate", "two rates", "schedule"])
def test_a_checkpoint_of_the_same_optimizer_is_resumed(checkpoint, photos, trained, tmp_path, call, settings):
    out = shutil.copytree(trained(settings), tmp_path / "out")
    common = small(checkpoint, photos, out)
    assert call(train_main, *common, "trainer.max_steps=4", "ckpt_path=last", *settings)[0] == 0
