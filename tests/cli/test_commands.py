"""The two commands as people use them: what they write and print, and how they end."""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from benchmarks.forked import Command
from sdmodule.cli.main import predict_main, train_main


@pytest.fixture(scope="session")
def checkpoint(small_checkpoint):
    return small_checkpoint


ROOT = Path(__file__).parents[2]
PROMPTS = ["a red circle on a blue background", "a small green star at the top on a white background"]


def records(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def told(result, *words):
    """Assert exit status 1 and one sentence on stderr that contains all of the words."""
    status, printed, complaint = result
    assert (status, printed) == (1, "")
    assert complaint.startswith("error: ") and complaint.count("\n") == 1 and complaint.endswith("\n")
    assert [word for word in words if word not in complaint] == []


# ---------------------------------------------------------------------------------------------- what is written


def test_predict_inpaints_a_photo_under_its_mask(call, checkpoint, tmp_path):
    photo, mask = tmp_path / "my photo, 1.png", tmp_path / "mask.png"
    before = np.random.default_rng(0).integers(0, 256, (700, 1000, 3), dtype=np.uint8)
    Image.fromarray(before).save(photo)
    white = np.zeros((700, 1000), dtype=np.uint8)
    white[300:420, 500:640] = 255
    Image.fromarray(white).save(mask)
    common = ["model=inpaint", f"pretrained={checkpoint}", f"image={photo}", f"prompt={PROMPTS[0]}", "steps=2"]
    common += ["only_masked=true"]
    result = call(predict_main, *common, f"mask={mask}", f"output_dir={tmp_path / 'out'}")
    assert result[0] == 0, result
    [record] = records(tmp_path / "out")
    assert record["inpaint"] == "known region re-noised at every step" and record["only_masked"] is True
    after = pixels(tmp_path / "out" / record["file"])
    assert after.shape == before.shape
    changed = (after != before).any(axis=2)
    assert changed[white > 0].mean() > 0.9 and not changed[white == 0].any()
    assert call(predict_main, *common, "mask=[500,300,640,420]", f"output_dir={tmp_path / 'box'}")[0] == 0
    assert np.array_equal(pixels(tmp_path / "box" / record["file"]), after)


def test_predict_writes_images_metadata_and_timings(call, checkpoint, tmp_path):
    common = [
        f"prompt={json.dumps(PROMPTS)}",
        f"pretrained={checkpoint}",
        "num_images_per_prompt=2",
        "seed=3",
        "steps=3",
    ]
    out = tmp_path / "out"
    status, printed, complaint = call(predict_main, *common, f"output_dir={out}")
    assert (status, complaint) == (0, "") and str(out / "grid.png") in printed
    names = ["00000-3.png", "00001-4.png", "00002-5.png", "00003-6.png"]
    assert sorted(os.listdir(out)) == [
        "config.yaml",
        "grid.png",
        "images",
        "index.html",
        "predictions.jsonl",
        "timings.json",
    ]
    assert sorted(os.listdir(out / "images")) == names

    for k, record in enumerate(records(out)):
        assert (record["file"], record["prompt"]) == (f"images/{names[k]}", PROMPTS[k // 2])
        assert record["seed"] == 3 + k and record["seconds"] > 0 and record["steps"] == 3
        assert record["model"] == str(checkpoint) and record["scheduler"] == "DDIMScheduler"
        text = Image.open(out / record["file"]).text
        assert text["prompt"] == record["prompt"]
        metadata = {key: value for key, value in record.items() if key not in ("file", "seconds")}
        assert {key: text[key] for key in metadata} == {
            k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()
        }

    timings = json.loads((out / "timings.json").read_text())
    assert set(timings["seconds"]) == {"text", "denoise", "decode", "save"}
    assert timings["images"] == 4 and timings["images_per_second"] > 0 and timings["peak_memory_bytes"] > 0

    one = tmp_path / "one"
    assert call(predict_main, *common, f"output_dir={one}", "batch_size=1")[0] == 0
    assert all(np.abs(pixels(out / "images" / name) - pixels(one / "images" / name)).max() <= 1 for name in names)
    assert json.loads((one / "timings.json").read_text())["warmup"]["images"] == 1


@pytest.mark.parametrize("captions", ["metadata", "txt"])
def test_train_writes_checkpoints_samples_metrics_and_a_pipeline(call, checkpoint, photos, tmp_path, captions):
    if captions == "txt":
        (photos / "metadata.jsonl").unlink()
        for k in range(6):
            (photos / f"{k}.txt").write_text(f"image {k}")
    out = tmp_path / "out"
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={out}", "steps=2", "resolution=32"]
    status, printed, complaint = call(
        train_main, *[f"+{s}" if s == "steps=2" else s for s in settings], "trainer.max_steps=4"
    )
    assert (status, complaint) == (0, "")
    assert "Training" in printed and str(out) in printed and len(printed.splitlines()) == 6
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["last.ckpt"]
    assert (out / "samples" / "000004.png").is_file()
    metrics = list(csv.DictReader((out / "metrics.csv").open()))
    assert any(row["train/loss"] for row in metrics) and any(row["val/loss"] for row in metrics)

    pipeline = StableDiffusionPipeline.from_pretrained(out / "export", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", num_inference_steps=2, height=32, width=32).images[0].size == (32, 32)


def test_train_runs_with_fewer_images_than_a_batch_and_none_for_validation(call, checkpoint, photos, tmp_path):
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}", "+steps=2"]
    settings += ["data.batch_size=16", "data.val_fraction=0", "trainer.max_steps=3", "trainer.val_check_interval=2"]
    with pytest.warns(UserWarning, match=r"data\.batch_size=16: .* only 6 training images, so the batch size is 6\."):
        status, _, complaint = call(train_main, *settings, "resolution=32")
    assert (status, complaint) == (0, "")
    assert (tmp_path / "out" / "samples" / "000003.png").is_file()
    assert (tmp_path / "out" / "export" / "model_index.json").is_file()


def test_an_autoencoder_trains_with_the_default_callbacks(call, checkpoint, photos, tmp_path):
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}", "resolution=32"]
    assert call(train_main, *settings, "model=autoencoder", "trainer.max_steps=2")[0] == 0
    assert (tmp_path / "out" / "export" / "vae").is_dir() and not (tmp_path / "out" / "samples").exists()


def test_a_training_resumes_from_its_checkpoint(call, checkpoint, photos, tmp_path, recwarn):
    settings = [
        f"data.root={photos}",
        f"pretrained={checkpoint}",
        f"output_dir={tmp_path / 'out'}",
        "callbacks=[checkpoint]",
    ]
    last = tmp_path / "out" / "checkpoints" / "last.ckpt"
    assert call(train_main, *settings, "resolution=32", "trainer.max_steps=2")[0] == 0
    status, _, complaint = call(train_main, *settings, "trainer.max_steps=2", f"ckpt_path={last}")
    assert status == 1 and "nothing is left to train" in complaint
    status, _, complaint = call(train_main, *settings, "trainer.max_steps=5", f"ckpt_path={last.parent}")
    assert status == 1 and f"ckpt_path={last.parent}: not found" in complaint and complaint.count("\n") == 1
    told(call(predict_main, f"pretrained={last}", "prompt=a cat"), "from the export/ of the run instead")
    settings += ["resolution=32", "callbacks.checkpoint.every_n_train_steps=4"]
    status, _, complaint = call(train_main, *settings, "trainer.max_steps=5", f"ckpt_path={last}")
    assert (status, complaint) == (0, "")
    assert [one for one in recwarn if "callbacks used to create the checkpoint" in str(one.message)] == []
    assert max(torch.load(path, weights_only=True)["global_step"] for path in last.parent.iterdir()) == 5
    assert (tmp_path / "out" / "metrics-1.csv").is_file()  # the metrics of the first run


@pytest.mark.slow
def test_the_validation_interval_counts_steps_whatever_the_length_of_an_epoch(call, checkpoint, photos, tmp_path):
    """An epoch has five batches; the last one makes a step by itself."""
    out = tmp_path / "out"
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", f"output_dir={out}", "callbacks=[checkpoint]"]
    settings += ["resolution=32", "data.batch_size=1", "trainer.accumulate_grad_batches=2"]
    settings += ["trainer.log_every_n_steps=1"]

    def steps_with(metric: str) -> list[int]:
        return [int(row["step"]) + 1 for row in csv.DictReader((out / "metrics.csv").open()) if row[metric]]

    assert call(train_main, *settings, "trainer.max_steps=5")[0] == 0
    assert steps_with("val/loss") == [5]
    resumed = ["trainer.max_steps=10", "trainer.val_check_interval=4", "ckpt_path=last"]
    assert call(train_main, *settings, *resumed)[0] == 0
    assert steps_with("train/loss") == [6, 7, 8, 9, 10]
    assert steps_with("val/loss") == [5, 8]  # the first again, since the checkpoint was written before it


def test_a_sweep_writes_one_folder_per_job(call, checkpoint, tmp_path):
    settings = ["prompt=a, b ${x}", f"pretrained={checkpoint}", f"output_dir={tmp_path / 'out'}"]
    status, _, complaint = call(predict_main, "-m", "steps=2,3", *settings)
    assert (status, complaint) == (0, "")
    assert [records(tmp_path / "out" / job)[0]["steps"] for job in ("0", "1")] == [2, 3]
    assert not (ROOT / "multirun.yaml").exists()


def test_the_default_output_folder_is_named_by_date_and_time(call, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDMODULE_STARTED", "2026-01-02/03-04-05")
    assert call(predict_main, "prompt=a", "steps=1", f"pretrained={checkpoint}")[0] == 0
    assert (tmp_path / "outputs/predict/2026-01-02/03-04-05/grid.png").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


@pytest.mark.slow
def test_a_second_training_moves_what_the_first_left(call, checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    common = [f"data.root={photos}", f"pretrained={checkpoint}", "resolution=32", "+steps=1", f"output_dir={out}"]
    status, printed, _ = call(train_main, *common, "trainer.max_steps=2")
    assert status == 0 and printed.startswith("On cpu") and "precision 32-true" in printed.splitlines()[0]
    first = (out / "checkpoints" / "last.ckpt").read_bytes()
    status, printed, _ = call(train_main, *common, "trainer.max_steps=1")
    assert status == 0 and "checkpoints-1" in printed
    assert (out / "checkpoints-1" / "last.ckpt").read_bytes() == first
    assert sorted(file.name for file in out.glob("checkpoints/*")) == ["last.ckpt"]
    assert torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    names = {file.name for file in out.iterdir()}
    assert {f"{name}-1{end}" for name, end in (("export", ""), ("samples", ""), ("metrics", ".csv"))} < names
    # what is resumed stays where it is
    status, printed, _ = call(train_main, *common, "trainer.max_steps=3", "ckpt_path=last")
    assert status == 0 and "Moved" not in printed and not (out / "checkpoints-2").exists()
    older = f"ckpt_path={out / 'checkpoints-1' / 'last.ckpt'}"
    status, printed, _ = call(train_main, *common, "trainer.max_steps=3", older)
    assert status == 0 and "Moved" in printed


def test_a_prompt_reaches_the_images_letter_for_letter_in_a_sweep(call, checkpoint, tmp_path):
    prompt = "a cat, (fluffy:1.2), 50% off = {fun} ünïcode 'it\\'s' \"q\" \\ ${x} $5 [a] ??? 🦊\n #x: \\"
    settings = [f"prompt={prompt}", "negative_prompt=???", "steps=1", f"pretrained={checkpoint}"]
    status, _, complaint = call(predict_main, "-m", *settings, f"output_dir={tmp_path / 'out'}")
    assert (status, complaint) == (0, "")
    [record] = records(tmp_path / "out" / "0")
    assert (record["prompt"], record["negative_prompt"]) == (prompt, "???")
    assert Image.open(tmp_path / "out" / "0" / record["file"]).text["prompt"] == prompt


# ---------------------------------------------------------------------------------------------- real processes


@pytest.mark.slow
def test_a_failing_process_prints_nothing_but_its_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log, errors = tmp_path.parent / f"{tmp_path.name}-log", tmp_path.parent / f"{tmp_path.name}-errors"
    one = Command("predict", "prompt=a", "experiment=sd15", f"output_dir={tmp_path / 'out'}", log=log, errors=errors)
    told((*one.wait(), errors.read_text()), "stable-diffusion-v1-5/stable-diffusion-v1-5", "pretrained=/")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_training_saves_a_checkpoint_and_says_how_to_resume(
    call, checkpoint, photos, tmp_path, sent, expected
):
    out, errors = tmp_path / "out", tmp_path / "errors"
    settings = [f"data.root={photos}", f"pretrained={checkpoint}", "resolution=32", "+steps=1"]
    forever = ["trainer.max_steps=100000", "trainer.val_check_interval=2", f"output_dir={out}"]
    one = Command("train", *settings, *forever, log=tmp_path / "log", errors=errors)
    one.wait_until((out / "samples" / "000002.png").is_file)
    one.send(sent)
    status, _ = one.wait()
    last, complaint = out / "checkpoints" / "last.ckpt", errors.read_text()
    assert (status, complaint.count("\n")) == (expected, 1) and f"ckpt_path={last}" in complaint, complaint

    step = torch.load(last, weights_only=True)["global_step"]
    again = [*settings, f"output_dir={tmp_path / 'again'}", f"trainer.max_steps={step + 2}", f"ckpt_path={last}"]
    status, _, complaint = call(train_main, *again)
    assert (status, complaint) == (0, "")
    assert torch.load(tmp_path / "again/checkpoints/last.ckpt", weights_only=True)["global_step"] == step + 2


def test_sigterm_ends_predict_at_once(checkpoint, tmp_path):
    out, errors = tmp_path / "out", tmp_path / "errors"
    settings = ["prompt=a", "num_images_per_prompt=100000", "batch_size=1", "steps=1", f"pretrained={checkpoint}"]
    one = Command("predict", *settings, f"output_dir={out}", log=tmp_path / "log", errors=errors)
    one.wait_until(lambda: bool(list(out.glob("images/*.png"))))
    one.send(signal.SIGTERM)
    assert one.wait()[0] == 143
    assert errors.read_text() == f"interrupted: what is done is in {out}\n"
