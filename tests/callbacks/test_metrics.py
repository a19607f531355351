"""Metrics in training: logged for the averaged weights, bounded in time, without a trace in the training."""

import csv
import math

import pytest
import torch

from benchmarks.forked import run_ranks
from sdmodule.callbacks.checkpoint import TrainingCheckpoint
from sdmodule.callbacks.ema import EMA
from sdmodule.callbacks.metrics import QualityMetrics
from sdmodule.cli.main import train_main
from sdmodule.data.toy.dataset import ShapesDataModule
from sdmodule.errors import SettingsError
from sdmodule.evaluation.distances import frechet_distance
from sdmodule.evaluation.text_image import clip_scores
from sdmodule.evaluation.transformers_scorer import TransformersScorer
from sdmodule.io.images import to_images
from sdmodule.module import StableDiffusionModule
from sdmodule.training.trainable import trainable_parameters
from tests.fitting import fit

pytestmark = pytest.mark.slow  # each test trains


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


def train(checkpoint, *callbacks, steps=2, **settings):
    module = StableDiffusionModule(
        str(checkpoint), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2), sampling={"steps": 1}
    )
    data = ShapesDataModule(batch_size=2, train_length=4, val_length=4, size=32)
    settings = {"num_sanity_val_steps": 0, "val_check_interval": 1, **settings}
    return module, fit(module, data, steps, *callbacks, **settings), data


def copied(module):
    return {name: value.detach().clone() for name, value in trainable_parameters(module).items()}


def test_training_is_the_same_with_and_without(checkpoint, clip_folder, capsys):
    plain, *_ = train(checkpoint)
    metrics = QualityMetrics(clip_folder, num_prompts=3, batch_size=2, max_share=1.0)
    measured, trainer, _ = train(checkpoint, metrics)
    torch.testing.assert_close(copied(measured), copied(plain), rtol=0, atol=0)
    assert trainer.callback_metrics.keys() >= {"val/clip_score", "val/fid", "val/kid"}
    assert all(math.isfinite(trainer.callback_metrics[f"val/{name}"]) for name in ("clip_score", "fid", "kid"))
    printed = capsys.readouterr().out
    assert "metrics at step 2: clip_score " in printed and "% of the training so far" in printed


def test_the_model_is_measured_before_its_first_step_too(call, checkpoint, clip_folder, photos, tmp_path):
    command = [f"pretrained={checkpoint}", f"data.root={photos}", f"output_dir={tmp_path / 'out'}", "resolution=32"]
    command += ["callbacks=[metrics]", f"callbacks.metrics.scorer={clip_folder}", "callbacks.metrics.num_prompts=2"]
    command += ["validate_first=true", "trainer.max_steps=1", "trainer.val_check_interval=1", "sampler.steps=1"]
    command += ["data.val_fraction=0.5", "callbacks.metrics.max_share=1"]
    status, printed, error = call(train_main, *command)
    assert status == 0, error
    assert "metrics at step 0: clip_score" in printed and "metrics at step 1: clip_score" in printed


def test_the_figures_are_those_of_the_averaged_weights(checkpoint, clip_folder):
    ema, metrics = EMA(start_step=1), QualityMetrics(clip_folder, num_prompts=3, batch_size=2, max_share=1.0)
    module, trainer, data = train(checkpoint, ema, metrics)
    scorer = TransformersScorer(clip_folder)
    examples = [example for batch in data.val_dataloader() for example in zip(batch["image"], batch["caption"])][:3]
    with ema.applied(module):
        samples = module.infer([caption for _, caption in examples], seed=0, show_progress=False)["samples"]
    features = scorer.image_features(samples)
    score = clip_scores(features, scorer.text_features([caption for _, caption in examples])).mean()
    real = scorer.image_features(to_images(torch.stack([image for image, _ in examples]) / 2 + 0.5))
    assert float(trainer.callback_metrics["val/clip_score"]) == pytest.approx(float(score), abs=1e-3)
    assert float(trainer.callback_metrics["val/fid"]) == pytest.approx(frechet_distance(features, real), rel=0.05)


def test_validations_above_the_share_go_unmeasured(checkpoint, clip_folder, capsys):
    metrics = QualityMetrics(clip_folder, num_prompts=2, max_share=1e-6)
    train(checkpoint, metrics)
    printed = capsys.readouterr().out
    assert printed.count("metrics at step") == 1
    assert "metrics: not measured at step 2, as they have taken" in printed
    assert "callbacks.metrics.max_share=1e-06" in printed


def test_the_checkpoint_of_the_best_validation_stays(checkpoint, clip_folder, tmp_path):
    class Scripted(QualityMetrics):
        figures = iter([3.0, 1.0, 2.0])

        def _measure(self, trainer, pl_module):
            return {"fid": next(self.figures)}

    keeper = TrainingCheckpoint(tmp_path, filename="{step}", monitor="val/fid", every_n_train_steps=500, save_last=True)
    train(checkpoint, Scripted(clip_folder, max_share=1.0), keeper, steps=3)
    assert sorted(file.name for file in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step=2.ckpt"]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    with pytest.raises(SettingsError, match=r"monitor=val/fidd: the validation logs no such metric; choose .*val/loss"):
        train(checkpoint, TrainingCheckpoint(tmp_path / "b", monitor="val/fidd"), steps=1)


def test_what_cannot_be_measured_is_said_before_training(call, checkpoint, clip_folder, photos, tmp_path):
    out = tmp_path / "out"
    command = [f"pretrained={checkpoint}", f"data.root={photos}", f"output_dir={out}", "callbacks=[metrics]"]
    cases = {
        (): "callbacks.metrics.scorer=null: must be given; give a CLIP-like model",
        (f"callbacks.metrics.scorer={tmp_path / 'none'}",): "none: not found",
        (f"callbacks.metrics.scorer={clip_folder}", "model=autoencoder"): "samples from prompts alone",
        ("callbacks.metrics.max_share=2",): "callbacks.metrics.max_share=2: must be a number",
    }
    for settings, message in cases.items():
        status, _, error = call(train_main, *command, *settings)
        assert status == 1 and message in error and error.count("\n") == 1, error
        assert not list(out.glob("*"))


def test_two_devices_sample_a_share_each(call, checkpoint, clip_folder, photos, tmp_path):
    command = [f"pretrained={checkpoint}", f"data.root={photos}", "data.val_fraction=0", f"data.val_root={photos}"]
    command += ["resolution=32", "trainer.max_steps=1", "trainer.val_check_interval=1", "sampler.steps=1"]
    command += ["model.optimizer.lr=1e-6", "callbacks=[metrics]", f"callbacks.metrics.scorer={clip_folder}"]
    command += ['callbacks.metrics.prompts=["a red circle", "a blue star", "a green heart"]']
    figures = {}
    assert call(train_main, *command, "data.batch_size=2", f"output_dir={tmp_path / 'alone'}")[0] == 0
    shared = [*command, "data.batch_size=1", f"output_dir={tmp_path / 'shared'}"]
    run_ranks("train", *shared, log=tmp_path / "shared.log")
    for name in ("alone", "shared"):
        with (tmp_path / name / "metrics.csv").open() as file:
            [figures[name]] = [row for row in csv.DictReader(file) if row["val/clip_score"]]
    for figure in ("val/clip_score", "val/fid"):
        assert math.isfinite(float(figures["shared"][figure]))
    alone, shared = (float(figures[name]["val/clip_score"]) for name in ("alone", "shared"))
    assert shared == pytest.approx(alone, abs=1e-4)
    assert (tmp_path / "shared.log").read_text().count("metrics at step 1:") == 1
